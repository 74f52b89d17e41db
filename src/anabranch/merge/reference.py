"""What there is to say about a merge method, from its registration and its docstring: for the command line and the docs."""

from __future__ import annotations

import inspect
import math

from anabranch.merge import INPUTS, METHODS, MergeMethod, Parameter


def one_line(method: MergeMethod) -> str:
    """The first sentence of its docstring."""
    return (inspect.getdoc(method.function) or "").split("\n", 1)[0]


def in_full(method: MergeMethod) -> str:
    """Name, source, needs, parameters, docstring."""
    least, most = method.branches
    count = f"{least}" if least == most else f"{least} or more" if most == math.inf else f"{least} to {most}"
    base = "a base" if method.needs_base else "a base if there is one" if method.takes_base else "no base"
    needs = [f"{name}: {INPUTS[name]}" for name in method.inputs if name not in ("branches", "base", "weights", "depth")]
    lines = [method.name, f"  source      {method.reference}",
             f"  merges      {count} branch{'es' if most > 1 else ''} and {base}"
             + (", by weights" if "weights" in method.inputs else "")]
    lines += [f"  needs       {need}" for need in needs]
    if method.fits == "matrix":
        lines.append(f"  fits        matrices; vectors and embeddings are merged by {method.otherwise}")
    lines += [f"  {'parameters' if not i else '':<11} {_parameter(p)}" for i, p in enumerate(method.parameters)]
    if any(p.name == "scale" for p in method.parameters) and method.name != "passthrough":
        lines.append("  in configs   `lambda` is `scale`; defaults of MergeKit's dialect stand in docs/numerics.md")
    return "\n".join(lines) + "\n\n" + (inspect.getdoc(method.function) or "") + "\n"


def markdown() -> str:
    """docs/methods.md."""
    parts = ["# Merge methods", "",
             "Generated from the code by `python -m anabranch.merge.reference`; a test compares the two.", "",
             "| method | what it does | source |", "|---|---|---|"]
    parts += [f"| [`{m.name}`](#{m.name}) | {one_line(m)} | {m.reference} |" for m in _sorted()]
    for method in _sorted():
        parts += ["", f"## {method.name}", "", "```text", in_full(method).rstrip(), "```"]
    return "\n".join(parts) + "\n"


def _sorted() -> list[MergeMethod]:
    return sorted(METHODS.values(), key=lambda method: method.name)


def _parameter(parameter: Parameter) -> str:
    default = "required" if parameter.default is None else f"default {parameter.default}"
    return f"{parameter.name}: {parameter.type.__name__}, {default}" + (", one for each branch or for all"
                                                                       if parameter.per_branch else "")


if __name__ == "__main__":
    print(markdown(), end="")
