"""Every method against a second implementation, in float64 and by the formula: no blocks, no Gram matrix, no cuts."""

import itertools
import math

import numpy as np
import pytest
import torch

from anabranch.merge import METHODS

CASES = []


def oracle(name, **arguments):
    def add(function):
        CASES.append((name, arguments, function))
        return function
    return add


def top(size, count, skip=0):
    """0/1 in the shape of `size`: ranks skip .. skip + count - 1 of the descending order, lower index first."""
    order = np.argsort(-size.ravel(), kind="stable")
    mask = np.zeros(size.size)
    mask[order[skip : skip + count]] = 1
    return mask.reshape(size.shape)


def consensus(parts, weights, normalize):
    """parts: task vectors, made sparse already."""
    weighted = parts * weights
    sign = np.where(weighted.sum(0) >= 0, 1, -1)
    agree = np.sign(weighted) == sign
    divisor = (agree * weights).sum(0) if normalize else 1
    return (weighted * agree).sum(0) / np.where(divisor == 0, 1, divisor)


def column(values, like):
    return np.asarray(values).reshape(-1, *[1] * (like.ndim - 1))


@oracle("linear")
@oracle("linear", normalize=False)
def _(x, x0, w, i, normalize=True):
    return (x * column(w, x)).sum(0) / (w.sum() if normalize else 1)


@oracle("token_weighted")
def _(x, x0, w, i):
    return np.average(x, axis=0, weights=w)


@oracle("interpolate", alpha=1.7)
def _(x, x0, w, i, alpha):
    return (1 - alpha) * x0 + alpha * np.average(x, axis=0, weights=w)


@oracle("passthrough", scale=0.3)
def _(x, x0, w, i, scale):
    return scale * x[0]


@oracle("fisher")
def _(x, x0, w, i):
    return np.average(x, axis=0, weights=i["fisher"] * column(w, x))


@oracle("slerp", t=0.3)
@oracle("slerp", t=-0.4)
def _(x, x0, w, i, t):
    angle = math.acos((x[0] * x0).sum() / np.linalg.norm(x[0]) / np.linalg.norm(x0))
    return (math.sin((1 - t) * angle) * x0 + math.sin(t * angle) * x[0]) / math.sin(angle)


@oracle("nuslerp")
@oracle("nuslerp", flatten=False)
@oracle("nuslerp", flatten=False, row_wise=True)
@oracle("nuslerp", with_base=False)
def _(x, x0, w, i, flatten=True, row_wise=False, with_base=True):
    v, t = x - x0 * with_base, w[1] / w.sum()
    axes = None if flatten else (0,) if row_wise else (v.ndim - 2,)
    inner = lambda a, b: (a * b).sum(axes, keepdims=True)  # noqa: E731 - a formula, as the paper writes it
    angle = np.arccos(inner(v[0], v[1]) / np.sqrt(inner(v[0], v[0]) * inner(v[1], v[1])))
    return (np.sin((1 - t) * angle) * v[0] + np.sin(t * angle) * v[1]) / np.sin(angle) + x0 * with_base


@oracle("multislerp")
@oracle("multislerp", normalize=False)
@oracle("multislerp", with_base=False)
def _(x, x0, w, i, normalize=True, with_base=True, eps=1e-8):
    """With the tangent step of the peer, which comes to nothing."""
    v, w = (x - x0 * with_base).reshape(len(x), -1), w / (w.sum() if normalize else 1)
    norms = np.linalg.norm(v, axis=1)
    u = v / (norms + eps)[:, None]
    m = w @ u
    m /= np.linalg.norm(m)
    g = w @ (u - (u @ m)[:, None] * m)
    h = np.linalg.norm(g) + eps
    return ((m * math.cos(h) + g * math.sin(h) / h) * (w @ norms)).reshape(x0.shape) + x0 * with_base


@oracle("karcher", max_iter=50, tol=1e-7)
@oracle("karcher", max_iter=2)
def _(x, x0, w, i, max_iter, tol=1e-5):
    v = x.reshape(len(x), -1)
    norms = np.linalg.norm(v, axis=1)
    units = v / norms[:, None]
    u = w @ units
    u /= np.linalg.norm(u)
    for _ in range(max_iter):
        angles = np.arccos(np.clip(units @ u, -1, 1))
        step = sum(b * a / math.sin(a) * (p - math.cos(a) * u) for b, a, p in zip(w, angles, units, strict=True))
        size = np.linalg.norm(step)
        if size < tol:
            break
        u = math.cos(size) * u + math.sin(size) * step / size
    return ((w @ norms) * u).reshape(x0.shape)


@oracle("task_arithmetic", normalize=True, scale=0.6)
@oracle("task_vector_mean", scale=0.6)
def _(x, x0, w, i, scale, normalize=True):
    return x0 + scale * ((x - x0) * column(w, x)).sum(0) / w.sum()


@oracle("layer_scaled", alpha=0.1, beta=0.8)
def _(x, x0, w, i, alpha, beta):
    return x0 + (alpha + beta * i["depth"]) * ((x - x0) * column(w, x)).sum(0)


@oracle("ties", density=0.37)
@oracle("ties", density=[0.1, 0.5, 1.0], normalize=False, scale=2.0)
@oracle("ties", density=0.37, rescale=True)
def _(x, x0, w, i, density, normalize=True, scale=1.0, rescale=False):
    d = x - x0
    rho = density if isinstance(density, list) else [density] * len(d)
    parts = np.stack([v * top(abs(v), int(r * v.size)) for v, r in zip(d, rho, strict=True)])
    if rescale:
        parts = np.stack([p * abs(v).sum() / abs(p).sum() for v, p in zip(d, parts, strict=True)])
    return x0 + scale * consensus(parts, column(w, x), normalize)


@oracle("ties_global")
def _(x, x0, w, i):
    d = x - x0
    return x0 + consensus(d * (abs(d) >= column(i["cuts"], x)), column(w, x), True)


@oracle("dare_linear", density=0.4)
@oracle("dare_ties", density=0.4, normalize=True)
@oracle("dare_linear", density=0.4, rescale="l1", normalize=True)
def _(x, x0, w, i, density, rescale="inverse_density", normalize=False):
    d = x - x0
    parts = d * (i["draws"] < density)
    if rescale == "l1":
        parts = np.stack([p * abs(v).sum() / abs(p).sum() for v, p in zip(d, parts, strict=True)])
        return x0 + (parts * column(w, x)).sum(0) / w.sum()
    parts = parts / density
    return x0 + (consensus(parts, column(w, x), True) if normalize else (parts * column(w, x)).sum(0))


@oracle("della", density=0.4, epsilon=0.2)
@oracle("della_linear", density=0.4, epsilon=0.2)
@oracle("della_linear", density=0.4, epsilon=0.2, rescale="l1")
def _(x, x0, w, i, density, epsilon, rescale=None, elect=None):
    d = x - x0
    rank = np.argsort(np.argsort(abs(d), axis=-1), axis=-1)
    p = density - epsilon + 2 * epsilon * rank / (d.shape[-1] - 1)
    kept = d * (i["draws"] < p)
    kept = np.stack([y * abs(v).sum() / abs(y).sum() for v, y in zip(d, kept, strict=True)]) if rescale else kept / p
    return x0 + (consensus(kept, column(w, x), True) if elect else (kept * column(w, x)).sum(0))


@oracle("breadcrumbs", density=0.5, gamma=0.1)
@oracle("breadcrumbs_ties", density=0.5, gamma=0.1)
@oracle("breadcrumbs", density=0.95, gamma=0.2, rescale=True)
def _(x, x0, w, i, density, gamma, rescale=False, elect=None):
    d, n = x - x0, x0.size
    target = int(density * n)
    skip = min(int(gamma * n), n - target)
    parts = np.stack([v * top(abs(v), target, skip) for v in d])
    if rescale:
        parts = np.stack([p * abs(v).sum() / abs(p).sum() for v, p in zip(d, parts, strict=True)])
    return x0 + (consensus(parts, column(w, x), False) if elect else (parts * column(w, x)).sum(0))


@oracle("sce", select_topk=0.3)
@oracle("sce", select_topk=1.0)
@oracle("sce", select_topk=0.3, floor=1e9)
def _(x, x0, w, i, select_topk, floor=0.0):
    d = x - x0
    variance = d.var(0)
    d = d * (top(variance, int((variance > 0).sum() * select_topk)) if select_topk < 1 else 1)
    energy = (d**2).reshape(len(d), -1).mean(1)
    q = column(energy / energy.sum() if energy.sum() >= floor else np.full(len(d), 1 / len(d)), d)
    agree = np.sign(d) == np.where(d.sum(0) >= 0, 1, -1)
    return x0 + (d * q * agree).sum(0) / np.maximum((q * agree).sum(0), 1e-6)


@oracle("ram", epsilon=0.05)
@oracle("ramplus_tl", epsilon=0.05, alpha=2.0, r=0.5)
def _(x, x0, w, i, epsilon, r=0.0, alpha=0.0):
    d = x - x0
    active = abs(d) > epsilon
    count = active.sum(0)
    own, shared = active & (count == 1), active & (count > 1)
    axes = tuple(range(1, d.ndim))
    grown = 1 + r * np.clip(shared.sum(axes) / np.maximum(own.sum(axes), epsilon), 0, alpha)
    return x0 + (d * own * column(grown, d) + d * shared / np.maximum(count, 1)).sum(0)


@oracle("model_stock", clamp=False)
@oracle("model_stock", filter_wise=True)
@oracle("model_stock", clamp=False, floor=1.0)
def _(x, x0, w, i, filter_wise=False, clamp=True, floor=1e-20):
    d, k = x - x0, len(x)
    axes = (d.ndim - 2,) if filter_wise else None
    cosines = [(a * b).sum(axes, keepdims=True) / np.maximum(
        np.sqrt((a * a).sum(axes, keepdims=True)) * np.sqrt((b * b).sum(axes, keepdims=True)), floor)
        for a, b in itertools.combinations(d, 2)]
    c = np.mean(np.clip(cosines, -1, 1), axis=0)
    t = k * c / (1 + (k - 1) * c)
    t = np.clip(t, 0, 1) if clamp else t
    return t * x.mean(0) + (1 - t) * x0


@oracle("nearswap", t=0.05)
def _(x, x0, w, i, t):
    q = np.clip(t / np.maximum(abs(x0 - x[0]), 1e-6), 0, 1)
    return q * x[0] + (1 - q) * x0


@oracle("arcee_fusion")
def _(x, x0, w, i):
    def softmax(z):
        e = np.exp(z - z.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True) + 1e-8

    p, q = softmax(x[0]), softmax(x0)
    importance = abs(x[0] - x0) * (p * np.log(p / q)).sum(-1, keepdims=True)
    order = np.sort(importance.ravel())
    low, median, high = (order[int(share * (order.size - 1))] for share in (0.25, 0.5, 0.75))
    return np.where(importance >= median + 1.5 * (high - low), x[0], x0)


def svd(a):
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    return u, s, vt


def joined(parts):
    """(polar of the left vectors, values, polar of the right ones)."""
    left, right = svd(np.concatenate([p[0] for p in parts], 1)), svd(np.concatenate([p[2] for p in parts], 0))
    return left[0] @ left[2], np.concatenate([p[1] for p in parts]), right[0] @ right[2]


@oracle("tsv_m", scale=0.9)
def _(x, x0, w, i, scale):
    r = min(x0.shape) // len(x)
    parts = [(u[:, :r], s[:r] * v, vt[:r]) for (u, s, vt), v in zip(map(svd, x - x0), w, strict=True)]
    left, values, right = joined(parts)
    return x0 + scale * left @ np.diag(values) @ right


@oracle("iso_c", scale=1.3)
def _(x, x0, w, i, scale):
    u, s, vt = svd(((x - x0) * column(w, x)).sum(0))
    return x0 + scale * s.mean() * u @ vt


@oracle("iso_cts", common_share=0.6)
@oracle("iso_cts", common_share=0.0)
def _(x, x0, w, i, common_share):
    d, r, k = (x - x0) * column(w, x), min(x0.shape), len(x)
    own = min(round((r - int(r * common_share)) / k), r // k)
    common = tuple(np.asarray(part) for part in svd(d.sum(0)))
    c = r - own * k
    u = common[0][:, :c]
    parts = []
    for v in d:
        left, s, right = svd(v - u @ u.T @ v)
        parts.append((left[:, :own], s[:own], right[:own]))
    left, values, right = joined([*parts, (u, common[1][:c], common[2][:c])])
    return x0 + values.mean() * left @ right


@oracle("star", energy=0.5)
@oracle("star", energy=1.0)
def _(x, x0, w, i, energy):
    out = np.zeros_like(x0)
    for v, d in zip(w, x - x0, strict=True):
        u, s, vt = svd(d)
        q = int(np.searchsorted(np.cumsum(s), energy * s.sum() * (1 - 1e-12))) + 1
        out += v / w.sum() * s.sum() / s[:q].sum() * (u[:, :q] * s[:q]) @ vt[:q]
    return x0 + out


def inputs_of(name, shape, seed):
    k = int(min(METHODS[name].branches[1], 3))
    generator = torch.Generator().manual_seed(seed)
    base = 0.3 * torch.randn(shape, generator=generator)
    weights = torch.rand(k, generator=generator) + 0.1
    return {"branches": base + 0.1 * torch.randn((k, *shape), generator=generator), "base": base,
            "weights": weights / weights.sum(), "draws": torch.rand((k, *shape), generator=generator),
            "fisher": torch.rand((k, *shape), generator=generator), "cuts": torch.rand(k, generator=generator) * 0.1,
            "depth": 0.3}


def test_every_method_has_an_oracle():
    assert {name for name, *_ in CASES} == set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c[0] + "".join(f"-{k}={v}" for k, v in c[1].items()))
@pytest.mark.parametrize("shape", [(37, 23), (16, 40)])
def test_the_method_gives_what_its_formula_says(case, shape):
    name, arguments, function = case
    for seed in (0, 1):
        given = inputs_of(name, shape, seed)
        method = METHODS[name]
        with_base = arguments.get("with_base", True)
        own = {key: value for key, value in arguments.items() if key != "with_base"}
        out = method.function(*(given[i] if i != "base" or with_base else None for i in method.inputs), **own)
        double = {key: value.double().numpy() if isinstance(value, torch.Tensor) else value for key, value in given.items()}
        extra = {"elect": name in ("della", "breadcrumbs_ties")} if "elect" in function.__code__.co_varnames else {}
        wanted = function(double["branches"], double["base"], double["weights"], double, **arguments, **extra)
        torch.testing.assert_close(out.double(), torch.from_numpy(np.asarray(wanted)), rtol=2e-6, atol=1e-6)


def test_a_sum_that_lacks_rank_stays_in_its_range():
    """Iso-C of two rank-2 steps in a 40 x 60 matrix: 4 directions of their mean length, and nothing outside them."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.stack([torch.randn(40, 2, generator=generator) @ torch.randn(2, 60, generator=generator) for _ in range(2)])
    base = torch.zeros(40, 60)
    for name in ("iso_c", "iso_cts"):
        s = np.linalg.svd(METHODS[name].function(steps, base, torch.ones(2)).double().numpy(), compute_uv=False)
        assert (s > 1e-4).sum() == 4 and np.ptp(s[:4]) < 1e-4 * s[0]
    total = np.linalg.svd(steps.sum(0).double().numpy(), compute_uv=False)
    assert np.linalg.svd(METHODS["iso_c"].function(steps, base, torch.ones(2)).double().numpy(), compute_uv=False).sum() == (
        pytest.approx(total.sum(), rel=1e-5))
    s = np.linalg.svd(METHODS["tsv_m"].function(steps, base, torch.ones(2)).double().numpy(), compute_uv=False)
    assert (s > 1e-4 * s[0]).sum() == 4


def test_a_frozen_branch_does_not_turn_the_others_in_tsv_m():
    given = inputs_of("tsv_m", (9, 12), 0)
    given["branches"][1:] = given["base"]
    out = METHODS["tsv_m"].function(given["branches"], given["base"], torch.ones(3))
    u, s, vt = np.linalg.svd((given["branches"][0] - given["base"]).double().numpy(), full_matrices=False)
    wanted = torch.from_numpy((u[:, :3] * s[:3]) @ vt[:3])
    torch.testing.assert_close((out - given["base"]).double(), wanted, rtol=1e-5, atol=1e-6)


def test_more_branches_than_directions_keep_one_each_in_tsv_m():
    step = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    steps = torch.stack([step, torch.zeros(2, 3), torch.zeros(2, 3)])
    out = METHODS["tsv_m"].function(steps, torch.zeros(2, 3), torch.ones(3))
    torch.testing.assert_close(out, torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_star_reaches_a_share_that_rounding_misses():
    """Singular values 6 and 4, turned by many angles: 60 % is the first alone, and 61 % takes both."""
    for angle in np.linspace(0.1, 3.0, 30):
        c, s = math.cos(angle), math.sin(angle)
        a = torch.tensor(np.array([[c, -s], [s, c]]) @ np.diag([6.0, 4.0]) @ np.array([[s, c], [-c, s]]), dtype=torch.float32)
        for energy, rank in [(0.6, 1), (0.61, 2)]:
            out = METHODS["star"].function(a[None], torch.zeros(2, 2), torch.ones(1), energy=energy)
            assert np.linalg.matrix_rank(out.double().numpy(), tol=1e-4) == rank


@pytest.mark.parametrize("n", range(1, 12))
def test_arcee_fusion_of_few_entries(n):
    for seed in range(5):
        given = inputs_of("arcee_fusion", (1, n), seed)
        function = next(f for name, _, f in CASES if name == "arcee_fusion")
        wanted = function(given["branches"].double().numpy(), given["base"].double().numpy(), None, None)
        out = METHODS["arcee_fusion"].function(given["branches"], given["base"])
        torch.testing.assert_close(out.double(), torch.from_numpy(wanted))


def test_arcee_fusion_where_rounding_makes_divergences_negative():
    """The peer's own float32 steps and a plain sort of what they give."""
    generator = torch.Generator().manual_seed(0)
    for columns in (2, 5, 64):
        base = 0.02 * torch.randn(64, columns, generator=generator)
        branch = base + 1e-6 * torch.randn(64, columns, generator=generator)
        p, q = branch.softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
        importance = (branch - base).abs() * (p * torch.log(p / q)).sum(-1, keepdim=True)
        order = importance.flatten().sort().values
        low, median, high = (order[int(share * (order.numel() - 1))] for share in (0.25, 0.5, 0.75))
        assert float(low) < 0 < float(high)
        wanted = torch.where(importance >= median + 1.5 * (high - low), branch, base)
        assert METHODS["arcee_fusion"].function(branch[None], base).equal(wanted)
