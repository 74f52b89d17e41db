"""What a config calls the parameters of a method, where each is read, and what it is if nothing is said.

The list of parameters is the signature of the registered method. Added here: the peer's names, and in the dialect
`mergekit` the peer's defaults where its conventions differ from ours (docs/numerics.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from anabranch.merge import METHODS, Argument, MergeMethod

Dialect = Literal["mergekit", "native"]
DIALECTS = ("mergekit", "native")
WEIGHT = "weight"

# The peer's name -> ours, for methods that have a parameter of our name.
ALIASES = {"lambda": "scale", "nuslerp_row_wise": "row_wise", "nuslerp_flatten": "flatten", "normalize_weights": "normalize"}
# `scale` of these is a factor of one model, and not the peer's `lambda`.
NO_LAMBDA = {"passthrough"}
# Parameters of the peer that change no result, with the reason.
INERT = {
    "int8_mask": "it saves MergeKit some memory and changes no number",
    "rescale": "this method drops nothing that the rest could make up for",
    "density": "this method keeps every entry",
}
TASK_ARITHMETIC = ("task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
                   "della_linear")
# Methods of the peer whose listed base is one more model (merge specification, 1.3).
BASE_IS_A_BRANCH = ("linear", "karcher", "passthrough")

PEER_DEFAULTS: dict[str, dict[str, Argument]] = {
    "linear": {"normalize": True},
    "nuslerp": {"row_wise": False, "flatten": True},
    "multislerp": {"normalize": True, "eps": 1e-8},
    "karcher": {"max_iter": 10, "tol": 1e-5},
    "task_arithmetic": {"normalize": False, "scale": 1.0},
    "ties": {"normalize": True, "scale": 1.0, "density": 1.0, "rescale": False},
    "dare_linear": {"normalize": False, "scale": 1.0, "density": 1.0, "rescale": "l1"},
    "dare_ties": {"normalize": False, "scale": 1.0, "density": 1.0, "rescale": "l1"},
    "breadcrumbs": {"normalize": False, "scale": 1.0, "density": 1.0, "gamma": 0.01, "rescale": False},
    "breadcrumbs_ties": {"normalize": False, "scale": 1.0, "density": 1.0, "gamma": 0.01, "rescale": False},
    "della": {"normalize": True, "scale": 1.0, "density": 1.0, "epsilon": 0.15, "rescale": "l1"},
    "della_linear": {"normalize": False, "scale": 1.0, "density": 1.0, "epsilon": 0.15, "rescale": "l1"},
    "sce": {"select_topk": 1.0, "floor": 1e-6},
    "ram": {"epsilon": 1e-5},
    "ramplus_tl": {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5},
    "model_stock": {"filter_wise": False, "floor": 1e-6, "clamp": False},
    "passthrough": {"scale": 1.0},
}
# What `rescale: true` means where the parameter is a word.
RESCALE_WORDS = {("mergekit", "dare"): "l1", ("mergekit", "della"): "l1",
                 ("native", "dare"): "inverse_density", ("native", "della"): "inverse_probability"}
WORDS = {"rescale": ("inverse_density", "inverse_probability", "l1", "none")}
# Methods whose weights are shares: the config's numbers are divided by their sum.
SHARES = ("token_weighted", "interpolate")

# (least, most) that a value may be, for parameters of that name in any method.
RANGES: dict[str, tuple[float, float]] = {
    "density": (0.0, 1.0), "gamma": (0.0, 1.0), "tol": (0.0, math.inf), "eps": (0.0, math.inf), "max_iter": (1.0, 1e6),
    "epsilon": (0.0, math.inf), "floor": (0.0, math.inf), "select_topk": (0.0, 1.0), "common_share": (0.0, 1.0),
    "energy": (0.0, 1.0),
}


@dataclass(frozen=True)
class Read:
    """A parameter that a method reads.

    scope     "model": each model may have its own value; "merge": one value, never looked for beside a model
    type      float, int, bool or str
    default   None: must be given
    """

    name: str
    scope: Literal["model", "merge"]
    type: type
    default: Argument | None
    least: float = -math.inf
    most: float = math.inf


def parameters_of(method: MergeMethod, dialect: Dialect) -> dict[str, Read]:
    """What a config may say to `method`, by our names; `weight` stands for the weights."""
    peer = PEER_DEFAULTS.get(method.name, {}) if dialect == "mergekit" else {}
    reads = {p.name: Read(p.name, "model" if p.per_branch else "merge", p.type, peer.get(p.name, p.default),
                          *RANGES.get(p.name, (-math.inf, math.inf))) for p in method.parameters}
    if method.name == "nearswap" and "t" in reads:
        reads["t"] = Read("t", "merge", float, None, 0.0)
    if "weights" in method.inputs and method.name != "karcher":
        needed = method.name in PEER_DEFAULTS or method.name in SHARES
        reads[WEIGHT] = Read(WEIGHT, "model", float, None if needed else 1.0)
    return reads


def our_name(method: MergeMethod, key: str) -> str:
    """Our name for a parameter that a config calls `key`."""
    ours = ALIASES.get(key, key)
    if ours == key or (key == "lambda" and method.name in NO_LAMBDA):
        return key
    return ours if any(p.name == ours for p in method.parameters) else key


def names_of(method: MergeMethod, dialect: Dialect) -> list[str]:
    """How a config of this dialect spells what the method reads: the peer's spelling where it has one."""
    spelled = {our_name(method, peer): peer for peer in ALIASES} if method.name in PEER_DEFAULTS else {}
    names = parameters_of(method, dialect)
    return [spelled.get(name, name) for name in names]


def known_anywhere() -> set[str]:
    """Every parameter that some method reads, or the peer accepts."""
    return {p.name for m in METHODS.values() for p in m.parameters} | set(ALIASES) | set(INERT) | {WEIGHT}


def why_inert(name: str) -> str:
    return f": {INERT[name]}" if name in INERT else ""


def typed(read: Read, method: str, dialect: Dialect, value: float | str) -> Argument:
    """A config's number (or word) as the method's argument. Raises ValueError with what was wanted."""
    if read.type is str:
        return _word(read, method, dialect, value)
    if isinstance(value, str):
        raise ValueError(f"got `{value}`, wanted a number")
    if not read.least <= value <= read.most:
        if math.isinf(read.most):
            raise ValueError(f"got {value:g}, wanted at least {read.least:g}")
        raise ValueError(f"got {value:g}, wanted {read.least:g} to {read.most:g}")
    if read.type is bool:
        if value not in (0.0, 1.0):
            raise ValueError(f"got {value:g}, wanted true or false")
        return bool(value)
    if read.type is int:
        if value != int(value):
            raise ValueError(f"got {value:g}, wanted a whole number")
        return int(value)
    return value


def _word(read: Read, method: str, dialect: Dialect, value: float | str) -> str:
    allowed = WORDS.get(read.name, ())
    if isinstance(value, str):
        if allowed and value not in allowed:
            raise ValueError(f"got `{value}`, wanted true, false or one of {', '.join(allowed)}")
        return value
    if read.name != "rescale" or value not in (0.0, 1.0):
        raise ValueError(f"got {value:g}, wanted one of {', '.join(allowed) or 'its words'}")
    return RESCALE_WORDS[dialect, method.split("_")[0]] if value else "none"


def takes_words(method: MergeMethod, name: str) -> bool:
    return any(p.name == name and p.type is str for p in method.parameters)
