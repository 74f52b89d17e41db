"""Weight-only metrics of checkpoints: against the naive definition, in bounded memory, resumable, and with clear errors."""

from __future__ import annotations

import ctypes
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from anabranch.engine.blocks import Buffers
from anabranch.errors import AnabranchError, ModelError, OutputError, RecipeError, ShapeMismatch
from anabranch.mergeability import eigen, weight_pass
from anabranch.mergeability.metrics import METRICS, PUBLISHED
from anabranch.mergeability.weight_pass import MATRIX_METRICS, NotFinite, bytes_held, tensor_numbers
from anabranch.mergeability.weights import WeightMetrics, weight_cost, weight_metrics

SHAPES = {"blocks.0.qkv.weight": (72, 24), "blocks.0.fc.weight": (96, 24), "blocks.0.proj.weight": (24, 96),
          "blocks.0.out.weight": (24, 24), "pos.embed": (5, 24), "patch.weight": (24, 3, 2, 2), "norm.weight": (24,),
          "text.frozen": (30, 24)}
PAIR = ("one", "two")


def draw(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int = 0, moved: float = 0.05, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    """Seed 0 is the base; others moved from it, all but the frozen tensor, most along a few directions."""
    found = {name: draw(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    if seed:
        for i, (name, shape) in enumerate(shapes.items()):
            if "frozen" not in name:
                found[name] = found[name] + moved * draw(shape, 1000 * seed + i)
                if len(shape) == 2:
                    found[name] += moved * draw((shape[0], 2), 77 * seed + i) @ draw((2, shape[1]), 78 * seed + i)
    return found


def write(folder: Path, tensors: dict[str, Tensor], config: dict | None = None, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", **(config or {})}))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    names = {f"model-{i + 1:05d}-of-{shards:05d}.safetensors": list(tensors)[i::shards] for i in range(shards)}
    for file, held in names.items():
        save_file({n: tensors[n] for n in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {n: file for file, held in names.items() for n in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture()
def models(tmp_path: Path) -> tuple[Path, dict[str, Path]]:
    folders = {n: write(tmp_path / n, state(i + 1)) for i, n in enumerate((*PAIR, "three"))}
    return write(tmp_path / "base", state()), folders


def naive(base: dict[str, Tensor], one: dict[str, Tensor], two: dict[str, Tensor], k: int = 10) -> dict[str, float]:
    """The 18 by their definitions: whole vectors, stacked and full SVDs, in float64."""
    us, vs = ({n: m[n].double() - base[n].double() for n in base if base[n].is_floating_point()} for m in (one, two))
    us, vs = ({n: x[n] for n in sorted(x) if us[n].any() or vs[n].any()} for x in (us, vs))
    u, v = (torch.cat([t.flatten() for t in x.values()]) for x in (us, vs))

    def rank(a: Tensor, b: Tensor) -> tuple[float, Tensor]:
        s = torch.linalg.svdvals(torch.stack([a, b]))
        p = s / s.sum()
        return math.exp(-torch.special.xlogy(p, p).sum()), s

    r, s = rank(u, v)
    cos = float(u @ v / u.norm() / v.norm())
    weights = [float(us[n].norm() + vs[n].norm()) for n in us]
    layer = sum(w * rank(us[n].flatten(), vs[n].flatten())[0] for w, n in zip(weights, us, strict=True)) / sum(weights)
    rows = []
    for n in us:
        if us[n].dim() == 2:
            (u1, s1, v1), (u2, s2, v2) = (torch.linalg.svd(x, full_matrices=False) for x in (us[n], vs[n]))
            c = min(k, len(s1))
            top, low, left = v1[:c] @ v2[:c].T, v1[-c:] @ v2[-c:].T, u1[:, :c].T @ u2[:, :c]
            p, q = s1[:100] / s1.sum(), s2[:100] / s2.sum()
            rows.append([top.norm() / c**0.5, low.norm() / c**0.5, (torch.linalg.svdvals(top) ** 2).mean(),
                         (torch.linalg.svdvals(low) ** 2).mean(), p @ q / p.norm() / q.norm(), left.norm() / c])
    means = dict(zip(MATRIX_METRICS, np.mean([[float(x) for x in row] for row in rows], axis=0).tolist(), strict=False))
    norms = sorted((float(u.norm()), float(v.norm())))
    return means | {
        "task_vector_cosine_similarity": cos, "task_vector_l2_distance": float((u - v).norm()),
        "task_vector_dot_product": float(u @ v), "weight_space_angle": math.degrees(math.acos(cos)),
        "task_vector_magnitude_ratio": norms[0] / norms[1], "effective_rank": r, "effective_rank_mergeability_score": 2 - r,
        "stable_rank": float(s.sum() ** 2 / (s @ s)), "spectral_gap": float((s[0] - s[1]) / s[0]),
        "singular_value_ratio": float(s[1] / s[0]), "layerwise_effective_rank": layer,
        "layerwise_effective_rank_mergeability_score": 2 - layer}


def assert_near(found: dict[str, float], wanted: dict[str, float], tolerance: float = 1e-8) -> None:
    assert {n: found[n] for n in wanted} == pytest.approx(wanted, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_all_18_equal_the_naive_definition(tmp_path, dtype):
    stored = [{n: t.to(dtype) for n, t in state(i).items()} for i in range(3)]
    for name, tensors in zip(("base", *PAIR), stored, strict=True):
        write(tmp_path / name, tensors, shards=1 + (name == "two"))
    found = weight_metrics(tmp_path / "base", {n: tmp_path / n for n in PAIR})
    wanted = naive(*stored)
    assert set(wanted) == {n for n in PUBLISHED if METRICS[n].needs == "weights"}
    assert_near(found.pairs[PAIR], wanted)
    assert found.excluded == {"text.frozen": "no model moved it"}
    assert found.left_out == {}
    assert found.norms["one"] == pytest.approx(math.sqrt(sum(
        float((stored[1][n].double() - stored[0][n].double()).square().sum()) for n in SHAPES)))


def pair_of(base: Tensor, one: Tensor, two: Tensor) -> dict[str, float]:
    (row,) = tensor_numbers(base, [one, two], Buffers()).pairs
    return dict(zip(MATRIX_METRICS, row, strict=True))


def spread(shape: tuple[int, int], decades: float, seed: int) -> Tensor:
    """A matrix whose singular values fall evenly by so many powers of ten."""
    u, v = (torch.linalg.qr(draw((n, min(shape)), seed + i).double())[0] for i, n in enumerate(shape))
    return u * torch.logspace(0, -decades, min(shape), dtype=torch.float64) @ v.T


@pytest.mark.parametrize("shape", [(400, 200), (200, 400), (220, 220)])
def test_small_singular_values_are_told_apart_though_the_gram_matrix_squares_them(shape):
    """Five decades: the square of the smallest is below the rounding of the square of the largest, times their number."""
    shared = spread(shape, 5, 0)
    one, two = (shared + 3e-5 * spread(shape, 1, seed) for seed in (10, 20))
    zero = torch.zeros(shape, dtype=torch.float64)
    found, wanted = pair_of(zero, one, two), naive({"w": zero}, {"w": one}, {"w": two})
    assert_near(found, {n: wanted[n] for n in MATRIX_METRICS[:6]}, 1e-8)
    assert 0.3 < found["right_subspace_overlap_bottom_k"] < 0.999  # neither noise nor identity


@pytest.mark.parametrize("shape", [(300, 250), (250, 300)])
def test_a_few_tiny_values_count_and_a_few_zeros_do_not(shape):
    """Below what a Gram matrix tells from zero (250: 2e-7 of the largest), above what an SVD does (5e-14)."""
    u, v = (torch.linalg.qr(draw((n, 250), n).double())[0] for n in shape)
    turned = torch.linalg.qr(draw((250, 250), 3).double())[0]
    for tiny, k in ((1e-9, 10), (0.0, 10)):
        values = torch.logspace(0, -4, 250, dtype=torch.float64)
        values[-3:] = tiny * torch.tensor([3.0, 2.0, 1.0])
        one, two = u * values @ v.T, u * values @ turned @ v.T
        found = pair_of(torch.zeros(shape, dtype=torch.float64), one, two)
        last = slice(-10, None) if tiny else slice(-13, -3)
        wanted = float((v.T[last] @ (turned @ v.T)[last].T).norm() / k**0.5)
        assert found["right_subspace_overlap_bottom_k"] == pytest.approx(wanted, abs=1e-6)
        assert wanted < 0.9


def test_of_low_rank_updates_only_the_directions_that_are_there_count():
    """LoRA of rank 4 and 6: compact SVDs of 4 and 6 directions; c = 4 of them on both ends."""
    base = torch.zeros(300, 200, dtype=torch.float64)
    one, two = (draw((300, r), r).double() @ draw((r, 200), 50 + r).double() for r in (4, 6))
    found = pair_of(base, one, two)
    (u1, _, v1), (u2, _, v2) = (torch.linalg.svd(x, full_matrices=False) for x in (one, two))
    assert_near(found, {
        "subspace_overlap": float((u1[:, :4].T @ u2[:, :4]).norm() / 4),
        "right_subspace_overlap_top_k": float((v1[:4] @ v2[:4].T).norm() / 2),
        "right_subspace_overlap_bottom_k": float((v1[:4] @ v2[2:6].T).norm() / 2), "top_k_energy": float(
            (1 + two.square().sum().reciprocal() * torch.linalg.svdvals(two)[:4].square().sum()) / 2)})
    wide = pair_of(base.T.contiguous(), one.T.contiguous(), two.T.contiguous())
    assert wide["right_subspace_overlap_bottom_k"] == pytest.approx(float((u1[:, :4].T @ u2[:, 2:6]).norm() / 2), abs=1e-8)


def test_top_k_cosine_is_that_of_the_best_approximations_of_rank_k():
    base = torch.zeros(60, 40, dtype=torch.float64)
    one, two = draw((60, 40), 1).double(), draw((60, 40), 2).double() + 0.5 * draw((60, 40), 1).double()
    parts = []
    for x in (one, two):
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        parts.append((u[:, :10] * s[:10] @ v[:10]).flatten())
    wanted = float(parts[0] @ parts[1] / parts[0].norm() / parts[1].norm())
    assert pair_of(base, one, two)["top_k_cosine"] == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("shape", [(90, 31), (31, 90), (700,), (24, 3, 4, 4)])
def test_pieces_add_up(monkeypatch, shape):
    tensors = [draw(shape, i) for i in range(4)]
    whole = tensor_numbers(tensors[0], tensors[1:], Buffers())
    monkeypatch.setattr(weight_pass, "PIECE", 200)
    cut = tensor_numbers(tensors[0], tensors[1:], Buffers())
    assert cut.gram == pytest.approx(whole.gram, rel=1e-12)
    assert cut.mass == pytest.approx(whole.mass, rel=1e-12)
    assert cut.base == pytest.approx(float(tensors[0].double().square().sum()))
    assert (cut.pairs is None) == (len(shape) != 2)
    if cut.pairs is not None:
        assert np.array(cut.pairs) == pytest.approx(np.array(whole.pairs), abs=1e-9)


def test_memory_does_not_grow_with_the_long_side():
    """20 models of an embedding of 150,000 x 896 are 21 GB in float64."""
    assert bytes_held((150_000, 896), 20) == bytes_held((15_000, 896), 20) < 150e6


def test_nan_is_found_in_matrices_and_in_others():
    for shape in ((20, 5), (9,)):
        bad = draw(shape, 1)
        bad.view(-1)[3] = float("nan")
        with pytest.raises(NotFinite):
            tensor_numbers(draw(shape, 0), [draw(shape, 2), bad], Buffers())


@pytest.mark.parametrize("size", [40, eigen.SELECTIVE, 300])
def test_ends_of_a_spectrum(size):
    matrix = draw((size + 50, size), 5).double().numpy()
    gram = np.zeros((size, size), order="F")
    eigen.add_gram(matrix[:70], gram, rows=False)
    eigen.add_gram(matrix[70:], gram, rows=False)
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    found = eigen.ends(gram, 10, 30)
    assert found.values == pytest.approx(values[::-1], rel=1e-9)
    assert found.rank == size
    assert abs(found.top.T @ vectors[:, ::-1][:, :10]) == pytest.approx(np.eye(10), abs=1e-9)
    assert abs(found.low.T @ vectors[:, :30]) == pytest.approx(np.eye(min(30, size)), abs=1e-9)


def test_ends_where_inverse_iteration_fails(monkeypatch):
    matrix = draw((300, 250), 6).double().numpy()
    grams = []
    for _ in range(2):
        grams.append(np.zeros((250, 250), order="F"))
        eigen.add_gram(matrix, grams[-1], rows=False)
    plain, call = eigen.ends(grams[0], 10, 30), eigen._call
    monkeypatch.setattr(eigen, "_call", lambda name, *a: 1 if name == "dstein" else call(name, *a))
    other = eigen.ends(grams[1], 10, 30)
    assert abs(plain.low.T @ other.low) == pytest.approx(np.eye(30), abs=1e-9)


def capsule(signature: str) -> object:
    """One of a C function that would end the program if it were called."""
    new = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p)
    SIGNATURES.append(ctypes.create_string_buffer(signature.encode()))
    return new(("PyCapsule_New", ctypes.pythonapi))(1, ctypes.addressof(SIGNATURES[-1]), None)


SIGNATURES: list[ctypes.Array] = []  # which no capsule owns


@pytest.fixture()
def anew():
    """LAPACK is looked for in this test, and again after it."""
    known = (eigen._routines, eigen.native)
    for one in known:
        one.cache_clear()
    yield
    for one in known:
        one.cache_clear()


TYPES = {"c": "char *", "i": "int *", "d": "__pyx_t_5scipy_6linalg_13cython_lapack_d *"}


@pytest.mark.parametrize("change", [
    lambda said: said.replace("int *", "long *"), lambda said: said.replace("int *", "int64_t *"),
    lambda said: said.replace("int *", "__pyx_t_5scipy_6linalg_13cython_lapack_blas_int *"),
    lambda said: said.replace("lapack_d *", "lapack_s *"), lambda said: said.replace("void (", "int ("),
    lambda said: said.replace("(char *, ", "("), lambda said: said + ", int *", lambda said: ""])
def test_routines_that_are_not_declared_as_known_are_not_called(monkeypatch, anew, change):
    table = {n: capsule(f"void ({', '.join(TYPES[k] for k in kinds)})") for n, kinds in eigen.ARGUMENTS.items()}
    monkeypatch.setattr(eigen, "cython_lapack", SimpleNamespace(__pyx_capi__=table))
    assert eigen._routine(eigen.cython_lapack, "dormtr") is not None
    table["dormtr"] = capsule(change(f"void ({', '.join(TYPES[k] for k in eigen.ARGUMENTS['dormtr'])})"))
    assert eigen._routine(eigen.cython_lapack, "dormtr") is None and not eigen.native()


@pytest.mark.parametrize("table", [SimpleNamespace(), SimpleNamespace(__pyx_capi__={}),
                                   SimpleNamespace(__pyx_capi__=dict.fromkeys(eigen.ARGUMENTS, 1))])
def test_routines_that_are_not_there_are_done_without(monkeypatch, anew, table):
    assert eigen.native()  # on the machines that this is tested on
    for one in (eigen._routines, eigen.native):
        one.cache_clear()
    monkeypatch.setattr(eigen, "cython_blas", table)
    assert not eigen.native()


@pytest.mark.parametrize("wrong", ["dsyrk", "dsterf", "dstein"])
def test_routines_that_are_wrong_about_a_small_matrix_are_not_called_again(monkeypatch, anew, wrong):
    call = eigen._call

    def lying(name: str, *arguments: object) -> int:
        info = call(name, *arguments)
        if name == wrong:
            next(a for a in reversed(arguments) if isinstance(a, np.ndarray) and a.dtype == float and a.size > 4)[:] *= 1.5
            if name == "dstein":
                arguments[7][:] = arguments[7][::-1]
        return info

    monkeypatch.setattr(eigen, "_call", lying)
    assert not eigen.native()


def test_without_lapack_numpy_gives_the_same(tmp_path, monkeypatch, anew):
    shapes = {"tall": (330, 260), "wide": (210, 400), "low": (250, 230), "small": (40, 30), "norm": (64,)}
    for i in range(4):
        tensors = state(i, shapes=shapes)
        if i:
            tensors["low"] = draw(shapes["low"], 2) + draw((250, 4 + i), 7 + i) @ draw((4 + i, 230), 17 + i)
        write(tmp_path / str(i), tensors)
    folders = {str(i): tmp_path / str(i) for i in (1, 2, 3)}
    assert eigen.native()
    plain = weight_metrics(tmp_path / "0", folders, journal=tmp_path / "journal")
    held = bytes_held((300, 300), 3)
    monkeypatch.setattr(eigen, "_routines", dict)
    eigen.native.cache_clear()
    calls, said = [], []
    monkeypatch.setattr(eigen, "_call", lambda name, *_: calls.append(name))
    found = weight_metrics(tmp_path / "0", folders, journal=tmp_path / "journal", tell=said.append)
    assert not calls and not said  # the journal of the other way is not gone on with
    for pair, wanted in plain.pairs.items():
        assert found.pairs[pair] == pytest.approx(wanted, rel=1e-9, abs=1e-9)
    assert bytes_held((300, 300), 3) > held  # of numpy's copies


def test_a_pair_has_no_order_and_scaling_leaves_what_has_no_scale(models, tmp_path):
    base, folders = models
    there = weight_metrics(base, folders).pairs
    back = weight_metrics(base, dict(reversed(folders.items()))).pairs
    turned = {"relative_norm1": "relative_norm2", "relative_norm2": "relative_norm1"}
    for (one, two), found in there.items():
        assert {turned.get(n, n): v for n, v in back[two, one].items()} == pytest.approx(found, rel=1e-9, abs=1e-9)
    scaled = {n: write(tmp_path / "scaled" / n, {t: state()[t] + 4 * (x - state()[t]) for t, x in state(i + 1).items()})
              for i, n in enumerate(PAIR)}  # powers of two: the stored update is nearly four times the old one
    found = weight_metrics(base, scaled).pairs[PAIR]
    sized = {"task_vector_l2_distance": 4, "task_vector_dot_product": 16, "relative_norm1": 4, "relative_norm2": 4}
    assert found == pytest.approx({n: v * sized.get(n, 1) for n, v in there[PAIR].items()}, rel=2e-5, abs=2e-5)


def test_threads_shards_and_resume_change_no_bit(models, tmp_path):
    base, folders = models
    said: list[str] = []
    plain = weight_metrics(base, folders, threads=1)
    again = {n: write(tmp_path / "sharded" / n, state(i + 1), shards=3) for i, n in enumerate(folders)}
    assert weight_metrics(base, again, threads=2).pairs == plain.pairs
    journal = tmp_path / "deep" / "journal"
    assert weight_metrics(base, folders, threads=2, journal=journal) == plain
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(SHAPES)
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:50])  # killed while it wrote
    assert weight_metrics(base, folders, journal=journal, tell=said.append) == plain
    assert said == ["3 of 8 tensors were measured before and are not measured again."]
    assert sorted(journal.read_bytes().splitlines()) == sorted(b"".join(lines).splitlines())


def test_a_finished_tensor_is_not_computed_again_but_one_of_other_models_is(models, tmp_path, monkeypatch):
    base, folders = models
    journal = tmp_path / "journal"
    weight_metrics(base, folders, journal=journal)
    computed = []
    monkeypatch.setattr("anabranch.mergeability.weights.tensor_numbers",
                        lambda *a, **k: computed.append(1) or tensor_numbers(*a, **k))
    weight_metrics(base, folders, journal=journal)
    assert not computed
    write(folders["two"], state(9))
    found = weight_metrics(base, folders, journal=journal)
    assert len(computed) == len(SHAPES)
    assert found.pairs == weight_metrics(base, folders).pairs


def test_a_failure_keeps_what_was_done(models, tmp_path, monkeypatch):
    base, folders = models
    journal, wanted = tmp_path / "journal", weight_metrics(base, folders)

    def failing(first: Tensor, *rest: object) -> object:
        if first.shape == (5, 24):
            raise KeyboardInterrupt
        return tensor_numbers(first, *rest)

    monkeypatch.setattr("anabranch.mergeability.weights.tensor_numbers", failing)
    with pytest.raises(KeyboardInterrupt):
        weight_metrics(base, folders, journal=journal, threads=1)
    monkeypatch.undo()
    assert len(journal.read_bytes().splitlines()) > 3
    assert weight_metrics(base, folders, journal=journal) == wanted


def test_integers_and_tied_heads_count_for_nothing(tmp_path):
    shapes = {"model.embed_tokens.weight": (40, 16), "model.norm.weight": (16,)}

    def tensors(seed: int, head: bool) -> dict[str, Tensor]:
        found = state(seed, shapes=shapes) | {"steps": torch.tensor([seed])}
        return found | ({"lm_head.weight": found["model.embed_tokens.weight"].clone()} if head else {})

    def measured(folder: Path, *heads: bool) -> WeightMetrics:
        for i, (name, head) in enumerate(zip(("base", *PAIR), heads, strict=True)):
            write(folder / name, tensors(i, head), {"tie_word_embeddings": True})
        return weight_metrics(folder / "base", {n: folder / n for n in PAIR})

    plain, every, some = (measured(tmp_path / str(i), *heads) for i, heads in enumerate(
        [(False, False, False), (True, True, True), (True, False, True)]))
    assert plain.pairs == every.pairs == some.pairs
    assert set(every.excluded) == set(some.excluded) == {"steps", "lm_head.weight"}
    assert plain.excluded == {"steps": "I64: integers have no update"}


def test_a_tensor_that_one_of_a_pair_did_not_move_is_left_out_of_its_subspace_means(tmp_path):
    states = [state(i) for i in range(4)]
    states[2]["blocks.0.fc.weight"] = states[0]["blocks.0.fc.weight"]
    for i, tensors in enumerate(states):
        write(tmp_path / str(i), tensors)
    found = weight_metrics(tmp_path / "0", {str(i): tmp_path / str(i) for i in (1, 2, 3)})
    less = [{n: t for n, t in s.items() if n != "blocks.0.fc.weight"} for s in states]
    subspaces = [n for n in PUBLISHED if METRICS[n].category == "subspace"]
    assert_near(found.pairs["1", "2"], {n: naive(less[0], less[1], less[2])[n] for n in subspaces})
    assert_near(found.pairs["1", "3"], naive(states[0], states[1], states[3]))
    assert "blocks.0.fc.weight" not in found.excluded


def test_without_matrices_the_subspace_metrics_are_left_out_with_the_reason(tmp_path):
    for i in range(3):
        write(tmp_path / str(i), state(i, shapes={"norm.weight": (24,)}))
    found = weight_metrics(tmp_path / "0", {str(i): tmp_path / str(i) for i in (1, 2)})
    assert set(found.left_out) == set(MATRIX_METRICS)
    assert not set(found.pairs["1", "2"]) & set(MATRIX_METRICS)


def test_remarks_on_a_model_given_twice_and_on_a_shared_offset(tmp_path, models):
    base, folders = models
    said: list[str] = []
    found = weight_metrics(base, {"one": folders["one"], "copy": folders["one"]}, tell=said.append)
    assert found.pairs["one", "copy"]["task_vector_cosine_similarity"] == pytest.approx(1)
    assert found.pairs["one", "copy"]["right_subspace_overlap_bottom_k"] == pytest.approx(1)
    assert len(said) == 1 and "one and copy are the same model" in said[0]
    offset = {n: write(tmp_path / "offset" / n, {t: x + 1 for t, x in state(i + 1).items()})
              for i, n in enumerate((*PAIR, "three", "four"))}
    said.clear()
    weight_metrics(base, offset, tell=said.append)
    assert len(said) == 1 and "share an offset" in said[0]
    said.clear()
    few = {n: offset[n] for n in PAIR} | {"again": offset["one"]}  # two models, whatever they are called
    weight_metrics(base, few, tell=said.append)
    assert len(said) == 2 and "one and again are the same model" in said[0]
    assert said[1].startswith("one and two are nearly the same model: their task vectors have a cosine of 0.9")
    said.clear()
    weight_metrics(base, folders, tell=said.append)
    assert said == []


def test_every_problem_with_the_folders_in_one_message(tmp_path, models):
    base, folders = models
    packed = write(tmp_path / "packed", state(4), {"quantization_config": {"bits": 4}})
    with pytest.raises(ModelError) as error:
        weight_metrics(tmp_path / "nowhere", folders | {"packed": packed, "gone": tmp_path / "gone"})
    message = str(error.value)
    assert all(word in message for word in ("nowhere", "gone", "packed", "quantization_config"))
    with pytest.raises(RecipeError, match="two or more"):
        weight_metrics(base, {"one": folders["one"]})
    with pytest.raises(ModelError, match="called 'base'"):
        weight_metrics(base, folders | {"base": packed})


def test_other_architectures(tmp_path, models):
    base, folders = models
    other = state(5) | {"norm.weight": draw((25,), 5), "more.weight": draw((3, 3), 5)}
    del other["pos.embed"]
    with pytest.raises(ShapeMismatch) as error:
        weight_metrics(base, folders | {"other": write(tmp_path / "other", other)})
    assert all(f"'{name}'" in str(error.value) for name in ("norm.weight", "more.weight", "pos.embed"))
    assert f"tensor 'more.weight': other ({tmp_path / 'other'}) has it" in str(error.value)
    assert " branch" not in str(error.value)


def test_the_base_itself_and_numbers_that_are_none(tmp_path, models):
    base, folders = models
    copies = {n: write(tmp_path / n, state(), shards=2) for n in ("same", "too")}
    with pytest.raises(ModelError) as error:
        weight_metrics(base, folders | copies)
    assert "same" in str(error.value) and "too" in str(error.value) and "one (" not in str(error.value)
    ill = {}
    for i, (name, value) in enumerate({"nan": float("nan"), "inf": float("inf")}.items()):
        tensors = state(6 + i)
        tensors["norm.weight" if i else "blocks.0.fc.weight"].view(-1)[7] = value
        ill[name] = write(tmp_path / name, tensors)
    journal = tmp_path / "journal"
    with pytest.raises(ModelError) as error:
        weight_metrics(base, folders | ill, journal=journal)
    assert "nan (" in str(error.value) and "inf (" in str(error.value) and "blocks.0.fc.weight" in str(error.value)
    assert all(isinstance(e, type) and issubclass(e, AnabranchError) for e in (ModelError, ShapeMismatch))


def test_a_journal_that_cannot_be_written(models, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        weight_metrics(*models, journal=tmp_path / "file" / "journal")


def test_the_forecast(models):
    cost = weight_cost(*models, threads=2)
    assert (cost.tensors, cost.matrices, cost.decompositions) == (8, 6, 18)
    assert cost.size == 4 * sum(t.nbytes for t in state().values())
    assert cost.size < cost.read < 3.1 * cost.size and cost.seconds > 0 and cost.peak > 10**7
    assert "3 pairs of 3 models" in cost.lines()[0]
