"""How long does the conflict stage take for T = 2,000 units? Beside it: the same Gram matrix by one plain matmul.

    python benchmarks/conflict_cost.py [--units 2000] [--size 65536]
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from anabranch.conflict import analyse, inner_products
from anabranch.partition import partition
from machine import peak_mb, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--units", type=int, default=2000)
    parser.add_argument("--size", type=int, default=2**16)
    args = parser.parse_args()
    random = np.random.default_rng(0)
    shared = random.standard_normal((8, args.size), dtype=np.float32)
    mean = random.standard_normal((args.units, 8), dtype=np.float32) @ shared
    a, b = ((mean + random.standard_normal(mean.shape, dtype=np.float32)) for _ in range(2))
    names = [f"unit-{i:04d}" for i in range(args.units)]
    tokens = np.full(args.units, 1000)
    begun = time.perf_counter()
    floor = mean @ mean.T
    matmul, begun = time.perf_counter() - begun, time.perf_counter()
    products = inner_products(names, names, list(a), list(b), tokens, tokens)
    inner, begun = time.perf_counter() - begun, time.perf_counter()
    result = analyse(products, "cosine")
    axes, begun = time.perf_counter() - begun, time.perf_counter()
    partition("merit", names, [100] * args.units, result.scores, result.cosine, 8, 0)
    split = time.perf_counter() - begun
    record("conflict_cost", {"units": args.units, "size": args.size, "plain_matmul_s": matmul, "inner_products_s": inner,
                             "analysis_s": axes, "partition_s": split, "total_s": inner + axes + split,
                             "floor_shape": list(floor.shape), "peak_mb": peak_mb()})


if __name__ == "__main__":
    main()
