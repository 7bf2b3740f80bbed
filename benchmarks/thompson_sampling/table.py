"""Tables of stored results: means over seeds and lengthscales, standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.thompson_sampling.comparison import Comparison, Result, comparisons
from benchmarks.uci.columns import DASH, format_figure, format_rows, mean_and_error

_REFERENCE = "sdd"
_COLUMNS = {
    "solve s": ("solve", 1),
    "maximise s": ("maximise_seconds", 1),
    "passes": ("passes", 1),
    "residual, mean": ("residual_mean", 3),
    "samples": ("residual_samples", 3),
}


def summary(results: Sequence[Result]) -> str:
    """All tables, those of the same settings together."""
    if not results:
        return "no results"
    return "\n\n".join(_block(group) for group in comparisons(results)) + "\n"


def _block(group: Comparison) -> str:
    if not group.problems:
        counts = ", ".join(f"{m} {len(runs)}" for m, runs in group.methods.items())
        return f"{group.title}: no problem was run with every method ({counts})"
    names = sorted(group.methods, key=lambda name: -_mean(_column(group, name, "best")))
    seeds = sorted({seed for _, seed in group.problems})
    starts = _column(group, names[0], "start")
    lines = [
        group.title,
        f"{len(group.problems)} problems that every method was run on, seeds "
        f"{', '.join(map(str, seeds))}; best at the start "
        f"{format_figure(*mean_and_error(starts), 3)}",
        "",
        _overall(group, names),
        "",
        _per_lengthscale(group, names),
    ]
    return "\n".join(lines)


def _overall(group: Comparison, names: Sequence[str]) -> str:
    reference = _REFERENCE if _REFERENCE in names else names[0]
    rows = [["", "best", f"above {reference}", "wins", *_COLUMNS]]
    others = _column(group, reference, "best")
    for name in names:
        best = _column(group, name, "best")
        gaps = [a - b for a, b in zip(best, others, strict=True)]
        compared = [DASH, DASH]
        if name != reference:
            compared = [
                format_figure(*mean_and_error(gaps), 3),
                f"{sum(gap > 0 for gap in gaps)} of {len(gaps)}",
            ]
        steps = [entry for run in group.runs(name) for entry in run["history"]]
        rows.append(
            [
                name,
                format_figure(*mean_and_error(best), 3),
                *compared,
                *(_average(steps, key, digits) for key, digits in _COLUMNS.values()),
            ]
        )
    return format_rows(rows)


def _per_lengthscale(group: Comparison, names: Sequence[str]) -> str:
    """Means over seeds; the first row is what was known at the start."""
    lengthscales = sorted({lengthscale for lengthscale, _ in group.problems})
    rows = [["lengthscale", *(f"{value:g}" for value in lengthscales)]]
    for label, name, key in [
        ("start", names[0], "start"),
        *((name, name, "best") for name in names),
    ]:
        cells = []
        for lengthscale in lengthscales:
            of_it = tuple(one for one in group.problems if one[0] == lengthscale)
            values = _column(Comparison(group.methods, of_it), name, key)
            cells.append(format_figure(*mean_and_error(values), 3))
        rows.append([label, *cells])
    return format_rows(rows)


def _column(group: Comparison, method: str, key: str) -> list[float]:
    return [float(run[key]) for run in group.runs(method)]


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _average(entries: Sequence[Mapping[str, Any]], key: str, digits: int) -> str:
    values = [float(e[key]) for e in entries if e.get(key) is not None]
    return f"{_mean(values):.{digits}f}" if values else DASH
