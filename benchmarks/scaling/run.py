"""Rows of the study, of which this module runs one."""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.checks import Check
from benchmarks.processes import run_under_torchrun
from benchmarks.study import Record, Row, Study

_USUAL: dict[str, Any] = {
    "n": 10_000,
    "dims": 8,
    "columns": 17,
    "solver": "auto",
    "tolerance": 1e-2,
    "dtype": "float32",
}

FASTER, CLOSE = 1.7, 1e-5
"""Asked of two processes: their speed over one, and the difference of answers."""

TURNS = {"product": 6, "cg": 3, "sdd": 2}
"""Of measurements with one process, with two, and with two that are not joined."""

LARGE_TOLERANCE = 1e-1
MILLION_BYTES = 4 * 2**30


def measured(kind: str, processes: int = 1, **settings: Any) -> Record:
    """One measurement of ``cost``, in so many processes of one thread.

    Raises:
        RuntimeError: It failed; with what it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        given = json.dumps({**_USUAL, **settings})
        module = "benchmarks.scaling.cost"
        run_under_torchrun(processes, module, str(out), kind, given)
        found: Record = json.loads(out.read_text())
        return {"processes": processes, **found}


def growth(
    kind: str, name: str, values: Sequence[int], **settings: Any
) -> Callable[[int], Record]:
    """Measurements at each value of one setting, with the exponents of their growth."""

    def measure(seed: int) -> Record:
        runs = [measured(kind, **{**settings, name: value}) for value in values]
        return {
            "runs": runs,
            "exponents": {
                of: exponent([r[name] for r in runs], [r[of] for r in runs])
                for of in ("cpu_seconds", "peak_bytes", "passes")
                if of in runs[0]
            },
        }

    return measure


def exponent(values: Sequence[float], figures: Sequence[float]) -> float:
    """The p of figure ~ value^p: a line through the logarithms, by least squares."""
    x = [math.log(value) for value in values]
    y = [math.log(max(figure, 1e-12)) for figure in figures]
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def no_checks(records: Sequence[Record]) -> Iterator[Check]:
    """Nothing is asked of how a cost grows: it is to be known."""
    return iter(())


def ranks(seed: int) -> Record:
    """One process against two, of one thread each, and against two that are alone.

    In turns, of which the fastest count: a virtual machine's cores have their moments,
    and two processes wait for the slower one. Two that do the whole work side by side,
    and never wait for each other, show what its second core is worth.
    """
    found: Record = {}
    for name, kind, solver in (
        ("product", "product", "auto"),
        ("cg", "solve", "auto"),
        ("sdd", "solve", "sdd"),
    ):
        settings: dict[str, Any] = {"n": 40_000, "solver": solver}
        turns = [
            {
                "one": measured(kind, **settings),
                "two": measured(kind, 2, **settings),
                "unjoined": side_by_side(kind, **settings),
            }
            for _ in range(TURNS[name])
        ]
        seconds = {of: min(turn[of]["seconds"] for turn in turns) for of in turns[0]}
        # In float64: rounding of float32 moves what a stochastic solver ends with.
        exact: dict[str, Any] = {"n": 6_000, "solver": solver, "dtype": "float64"}
        alone, both = (measured(kind, p, **exact) for p in (1, 2))
        answers = ("values",) if kind == "product" else ("mean", "variance")
        found[name] = {
            "seconds": seconds,
            "turns": [{of: turn[of]["seconds"] for of in turn} for turn in turns],
            "peak_bytes": {
                of: max(turn[of]["peak_bytes"] for turn in turns) for of in turns[0]
            },
            "faster": seconds["one"] / seconds["two"],
            "allowed": 2 * seconds["one"] / seconds["unjoined"],
            "difference": max(_difference(alone[a], both[a]) for a in answers),
        }
    return found


def side_by_side(kind: str, **settings: Any) -> Record:
    """The slower of two measurements at once, each in a process that is alone."""
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda _: measured(kind, **settings), range(2)))
    return max(runs, key=lambda run: run["seconds"])


def _difference(one: Sequence[float], other: Sequence[float]) -> float:
    """Relative to the largest."""
    largest = max(abs(value) for value in one)
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) / largest


def rank_checks(records: Sequence[Record]) -> Iterator[Check]:
    """Speed and answers of two processes."""
    for name in ("product", "cg", "sdd"):
        speed = min(record[name]["faster"] for record in records)
        allowed = min(record[name]["allowed"] for record in records)
        apart = max(record[name]["difference"] for record in records)
        yield Check(
            f"two processes, {name}: speed over one ({allowed:.2f} if never joined)",
            f"{speed:.2f}",
            f">= {FASTER}",
            speed >= FASTER,
        )
        yield Check(
            f"two processes, {name}: difference of answers",
            f"{apart:.1e}",
            f"<= {CLOSE}",
            apart <= CLOSE,
        )


def large(seed: int) -> Record:
    """200,000 rows, solved."""
    return measured("solve", n=200_000, solver="sdd", tolerance=LARGE_TOLERANCE)


def large_checks(records: Sequence[Record]) -> Iterator[Check]:
    """The residual."""
    worst = max(record["residual"] for record in records)
    yield Check(
        "200,000 rows: residual",
        f"{worst:.3f}",
        f"<= {LARGE_TOLERANCE}",
        worst <= LARGE_TOLERANCE,
    )


def million(seed: int) -> Record:
    """An epoch over a million rows, modelled from a hundredth of it."""
    return measured("epoch", n=1_000_000)


def million_checks(records: Sequence[Record]) -> Iterator[Check]:
    """The memory; seconds are modelled, and only told."""
    most = max(record["peak_bytes"] for record in records)
    hours = max(record["seconds"] for record in records) / 3600
    yield Check(
        f"1,000,000 rows, an epoch of {hours:.1f} hours (modelled): bytes",
        f"{most / 2**30:.2f} GiB",
        f"<= {MILLION_BYTES / 2**30:.0f} GiB",
        most <= MILLION_BYTES,
    )


STUDY = Study(
    "scaling",
    "What a solve costs, against rows, inputs, columns and processes.",
    {
        "n": Row(growth("solve", "n", (1_000, 3_000, 10_000, 30_000)), no_checks),
        "sdd_n": Row(
            growth("solve", "n", (3_000, 10_000, 30_000), solver="sdd"), no_checks
        ),
        "epoch_n": Row(growth("epoch", "n", (10_000, 100_000)), no_checks),
        "dims": Row(growth("solve", "dims", (2, 8, 32, 128)), no_checks),
        "columns": Row(growth("solve", "columns", (2, 17, 65)), no_checks),
        "ranks": Row(ranks, rank_checks),
        "large": Row(large, large_checks),
        "million": Row(million, million_checks),
    },
)

if __name__ == "__main__":
    sys.exit(STUDY.run(sys.argv[1:]))
