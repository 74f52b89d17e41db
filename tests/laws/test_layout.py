"""The layout's rules, held by reading the imports."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "anabranch"
MODULES = sorted(SOURCE.rglob("*.py"))
NESTED = ("diagnose", "mergeability")
STAGES = {"mixture", "gradients", "conflict", "partition", "branches", "evaluate"}
PURE = ["conflict.py", "partition.py", "theory.py", "outlook.py", "finish.py", "merge",
        *(f"diagnose/{m}.py" for m in ("connectivity", "displacement", "surface", "perturbation", "curvature", "calibration",
                                       "gradient_map")),
        *(f"mergeability/{m}.py" for m in ("metrics", "eigen", "published", "published_arms", "rule", "predict", "trial",
                                           "sets"))]
PURE_MAY_IMPORT = {"artifacts", "errors", "rows", "merge", "theory", "recipe", "scores", "diagnose.artifacts",
                   *(f"mergeability.{m}" for m in ("artifacts", "metrics", "table", "published", "rule", "predict"))}


def imports(path: Path) -> set[str]:
    """Dotted names that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{a.name}" for a in node.names}
    return found


def ours(path: Path) -> set[str]:
    """First-level modules of the package that a module imports; of the diagnostics and of mergeability, which one."""
    parts = [name.split(".")[1:] for name in imports(path) if name.startswith("anabranch.")]
    return {".".join(p[:2]) if p[0] in NESTED else p[0] for p in parts if len(p) > 1 or p[0] not in NESTED}


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_stages_are_joined_by_files_not_by_imports(stage):
    assert not ours(SOURCE / f"{stage}.py") & (STAGES - {stage})


@pytest.mark.parametrize("name", PURE)
def test_maths_knows_no_file(name):
    path = SOURCE / name
    for module in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        assert ours(module) <= PURE_MAY_IMPORT, module
        assert not imports(module) & {"pathlib", "os", "io", "safetensors", "shutil"}, module
        assert not re.search(r"\bopen\(", module.read_text()), module


def test_engine_knows_no_formula():
    """It may know how a tensor is handed to a method, and how it is ranked; not what any method does."""
    interface = {"__init__", "stack", "select", "displacement", "kernels", "reference"}
    families = {f"anabranch.merge.{path.stem}" for path in (SOURCE / "merge").glob("*.py") if path.stem not in interface}
    assert families
    for module in (SOURCE / "engine").glob("*.py"):
        assert not {n for n in imports(module) if n in families or n.rpartition(".")[0] in families}, module


def test_no_junk_drawer():
    junk = {"utils", "util", "common", "helpers", "helper", "core", "base", "types", "misc"}
    assert not {m.stem for m in MODULES} & junk
    assert not {m.parent.name for m in MODULES} & junk


def test_no_pickle_and_no_remote_code_by_default():
    for module in MODULES:
        text = module.read_text()
        assert not imports(module) & {"pickle", "joblib", "dill", "cloudpickle"}, module
        assert "torch.save(" not in text, module
        if module.relative_to(SOURCE) != Path("engine/fetch.py"):  # which converts pickles, where the user allows it
            assert "torch.load(" not in text, module
        for call in re.findall(r"torch\.load\([^)]*\)", text):
            assert "weights_only=True" in call, call
        assert "trust_remote_code=True" not in text, module


def test_cli_imports_nothing_heavy_before_it_has_parsed():
    top = [n for path in sorted(SOURCE.glob("cli*.py")) for n in ast.parse(path.read_text()).body]
    names = {a.name for n in top if isinstance(n, ast.Import) for a in n.names}
    names |= {n.module or "" for n in top if isinstance(n, ast.ImportFrom)}
    assert not {n.split(".")[0] for n in names} & {"torch", "transformers", "trl", "datasets", "numpy", "scipy"}
    assert {n for n in names if n.startswith("anabranch")} <= {"anabranch", "anabranch.errors"}


def test_every_module_says_what_it_is():
    bare = [m for m in MODULES if m.name != "__main__.py" and not ast.get_docstring(ast.parse(m.read_text()))]
    assert not bare
