r"""Wall clock of K V per kernel entry, beside rivals and the limit of the machine.

    python -m benchmarks.peers --json benchmarks/peers/measured/products.json
    python -m benchmarks.peers --n 20000 --dims 9 --columns 17 --kernels matern32 \
        --assert-ratio 2

The first is the whole table, some minutes. With ``--assert-ratio`` the exit status is 3
where a product is less than so many times as fast as the best other library's.

Rivals take turns, and the fastest of each one's turns counts; all use the same number
of threads. ``sgdgp`` and ``before`` (what it was before version 0.2: ``before.py``)
multiply all of K, the others some of its rows. ``of limit`` is the fraction of what
``limit.py`` allows, ``x before`` and ``x peer`` how many times as fast as the former
operator and as the best other library. KeOps compiles for minutes at its first run.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.checks import SHORT
from benchmarks.json_file import write_json
from benchmarks.peers.limit import limit
from benchmarks.peers.rivals import RIVALS, Case

_ROWS = {"gpytorch": 4096, "sklearn": 512, "keops": 1024}
"""Rows that slower rivals multiply."""

_TURNS = {"sgdgp": 5, "before": 3}
_WRONG = 1e-4  # relative difference from the others that is more than rounding


def measured(
    kernel: str, n: int, dim: int, columns: int, rivals: Sequence[str], threads: int
) -> dict[str, Any]:
    """One row of the table; seconds per entry of K in nanoseconds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, dim, generator=generator)
    case = Case(kernel, x, torch.randn(n, columns, generator=generator))
    rows = {name: min(n, _ROWS.get(name, n)) for name in rivals}
    products = {name: RIVALS[name](case, rows[name]) for name in rivals}
    best, least = dict.fromkeys(rivals, float("inf")), float("inf")
    found = {name: product() for name, product in products.items()}  # and warm up
    for turn in range(max(_TURNS.values())):
        least = min(least, limit(dim, columns, threads))
        for name, product in products.items():
            if turn < _TURNS.get(name, 2):
                start = time.perf_counter()
                product()
                spent = time.perf_counter() - start
                best[name] = min(best[name], 1e9 * spent / (rows[name] * n))
    few = min(rows.values())
    truth = found["sgdgp"][:few]
    for name, other in found.items():
        error = float((other[:few] - truth).norm() / truth.norm())
        if not error < _WRONG:
            raise RuntimeError(f"{name}: off by {error:.1e} for {kernel}, d={dim}")
    ns = 1e9 * least
    peers = [best[name] for name in rivals if name not in ("sgdgp", "before")]
    return {
        "kernel": kernel,
        "d": dim,
        "columns": columns,
        "limit": ns,
        **best,
        "of limit": ns / best["sgdgp"],
        "x before": best["before"] / best["sgdgp"],
        "x peer": min(peers) / best["sgdgp"] if peers else None,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; the exit status says whether the ratio that was asked holds."""
    parser = _parser()
    chosen = parser.parse_args(arguments)
    counts = {
        "n": [chosen.n],
        "threads": [chosen.threads],
        "dims": chosen.dims,
        "columns": chosen.columns,
    }
    for name, given in counts.items():
        if min(given) < 1:
            parser.error(f"--{name}: expected at least 1, found {min(given)}")
    torch.set_num_threads(chosen.threads)
    rivals = ["sgdgp", *dict.fromkeys(["before", *chosen.rivals])]
    rows: list[dict[str, Any]] = []
    for kernel in chosen.kernels:
        for dim in chosen.dims:
            for columns in chosen.columns:
                row = measured(kernel, chosen.n, dim, columns, rivals, chosen.threads)
                if not rows:
                    print("  ".join(f"{name:>8}" for name in row))
                cells = (
                    f"{cell:>8.2f}" if isinstance(cell, float) else f"{cell!s:>8}"
                    for cell in row.values()
                )
                print("  ".join(cells), flush=True)
                rows.append(row)
    if chosen.json is not None:
        machine = {"processor": platform.processor(), "cores": os.cpu_count()}
        about = {"n": chosen.n, "threads": chosen.threads, "torch": torch.__version__}
        command = f"python -m benchmarks.peers {' '.join(arguments or sys.argv[1:])}"
        about = {"command": command, **machine, **about}
        write_json(chosen.json, {**about, "unit": "ns per entry", "rows": rows})
    ratios = [row["x peer"] for row in rows if row["x peer"] is not None]
    asked = chosen.assert_ratio
    if asked is None or (ratios and min(ratios) >= asked):
        return 0
    print(
        f"falls short: {min(ratios, default=0.0):.2f} times the best, asked {asked:g}"
    )
    return SHORT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, peers = parser.add_argument, [name for name in RIVALS if name != "sgdgp"]
    kernels = ["rbf", "matern32"]
    add("--n", type=int, default=20_000)
    add("--dims", type=int, nargs="+", default=[3, 9, 26, 90])
    add("--columns", type=int, nargs="+", default=[1, 17, 65])
    add("--kernels", nargs="+", default=kernels, choices=kernels)
    add("--rivals", nargs="*", default=peers, choices=peers)
    add("--threads", type=int, default=torch.get_num_threads())
    add("--assert-ratio", type=float, help="how many times the best other library")
    add("--json", type=Path, help="file that takes the table")
    return parser


if __name__ == "__main__":
    sys.exit(main())
