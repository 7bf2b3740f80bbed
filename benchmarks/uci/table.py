"""Tables of stored results: ``python -m benchmarks.uci.table RESULTS``.

RMSE and NLL as mean over splits ± standard error (sample standard deviation over
sqrt(number of splits)), data sets as columns, published rows above one's own; then
one line per data set and solver with everything else.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.uci.reference import LOW_NOISE_SCALE, Published, published_rows
from benchmarks.uci.store import read_results, request_of

Result: TypeAlias = Mapping[str, Any]

_DASH = "-"
_DETAIL_HEADER = (
    "data set",
    "run",
    "splits",
    "RMSE / exact",
    "NLL - exact",
    "coverage",
    "CRPS",
    "calib.",
    "res. mean",
    "res. samples",
    "passes",
    "prior s",
    "solve s",
    "predict s",
    "peak MB",
    "reason",
)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error for a single value."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values))


def format_figure(mean: float, error: float | None, digits: int = 4) -> str:
    """``0.0812 ± 0.0011``, or the mean alone."""
    text = f"{mean:.{digits}f}"
    return text if error is None else f"{text} ± {error:.{digits}f}"


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Cells in aligned columns, a rule under the first row (the header)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
    rule = "  ".join("-" * width for width in widths)
    return "\n".join([lines[0], rule, *lines[1:]])


def row_label(result: Result) -> str:
    """The solver of a run, with every setting that is not the default."""
    request = request_of(result)
    # The reference is float64 by its nature: no deviation worth a word.
    plain = replace(request, dtype="float32") if request.solver == "exact" else request
    return f"{request.solver} ({plain.variant})" if plain.variant else request.solver


def one_line(result: Result) -> str:
    """What is told of a run when it ends."""
    figures = [
        f"{name} {_DASH if result.get(name) is None else format(result[name], form)}"
        for name, form in (("rmse", ".4f"), ("nll", ".4f"), ("passes", ".1f"))
    ]
    seconds = sum(result["seconds"].values())
    return (
        f"{result['dataset']} {result['split']} {row_label(result)}: "
        f"{', '.join(figures)}, {seconds:.1f} s, {result['reason']}"
    )


def summary(results: Sequence[Result]) -> str:
    """The whole report on a set of results."""
    if not results:
        return "no results"
    low = [r for r in results if request_of(r).noise_scale == LOW_NOISE_SCALE]
    regular = [r for r in results if request_of(r).noise_scale != LOW_NOISE_SCALE]
    parts = []
    for group, low_noise in ((regular, False), (low, True)):
        if not group:
            continue
        for metric in ("rmse", "nll"):
            title = f"{metric.upper()}, mean over splits ± standard error"
            title += " († noise standard deviation 0.001)" if low_noise else ""
            parts.append(title + "\n" + _metric_table(group, metric, low_noise))
    parts.append(_details(results))
    return "\n\n".join(parts) + "\n"


def _metric_table(results: Sequence[Result], metric: str, low_noise: bool) -> str:
    datasets = list(dict.fromkeys(str(result["dataset"]) for result in results))
    rows = [["", *datasets]]
    for label, figures in published_rows(metric, low_noise=low_noise).items():
        if any(name in figures for name in datasets):
            rows.append([label, *(_published(figures.get(name)) for name in datasets)])
    for label, group in _grouped(results, row_label):
        cells = dict(_grouped(group, lambda result: str(result["dataset"])))
        rows.append(
            [label, *(_measured(cells.get(name, []), metric) for name in datasets)]
        )
    return format_rows(rows)


def _published(figure: Published | None) -> str:
    if figure is None:
        return _DASH
    return format_figure(figure.value, figure.error, _digits(figure.value))


def _digits(value: float) -> int:
    """As many decimals as were printed: two, or four."""
    return 2 if math.isclose(value, round(value, 2), abs_tol=1e-9) else 4


def _measured(results: Sequence[Result], metric: str) -> str:
    """Mean and error over splits, and how many there are; missing ones are named."""
    values = [result[metric] for result in results if result.get(metric) is not None]
    if not results:
        return _DASH
    if len(values) < len(results):
        return f"failed on {len(results) - len(values)} of {len(results)}"
    return f"{format_figure(*mean_and_error(values))} [{len(values)}]"


def _grouped(results: Iterable[Result], key: Any) -> list[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return list(groups.items())


def _details(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = [_DETAIL_HEADER]
    for name, group in _grouped(results, lambda result: str(result["dataset"])):
        for label, runs in _grouped(group, row_label):
            rows.append(_detail_row(name, label, runs))
    return (
        "Details, means over splits (residuals, memory: the largest)\n"
        + format_rows(rows)
    )


def _detail_row(name: str, label: str, runs: Sequence[Result]) -> tuple[str, ...]:
    def average(values: Iterable[float | None], form: str) -> str:
        found = [value for value in values if value is not None]
        return format(math.fsum(found) / len(found), form) if found else _DASH

    def largest(key: str, form: str) -> str:
        found = [run[key] for run in runs if run.get(key) is not None]
        return format(max(found), form) if found else _DASH

    exact = [run for run in runs if run.get("exact") and run["rmse"] is not None]
    with_nll = [run for run in exact if run["nll"] is not None]
    used = dict.fromkeys(
        f"{run['solver_used']}/{run['operator']}"
        for run in runs
        if "solver_used" in run
    )
    reasons = " ".join(dict.fromkeys(str(run["reason"]) for run in runs))
    return (
        name,
        f"{label} -> {' '.join(used)}" if used else label,
        ",".join(str(run["split"]) for run in runs),
        average((run["rmse"] / run["exact"]["rmse"] for run in exact), ".4f"),
        average((run["nll"] - run["exact"]["nll"] for run in with_nll), "+.4f"),
        average((run["coverage"] for run in runs), ".3f"),
        average((run["crps"] for run in runs), ".4f"),
        average((run["calibration_error"] for run in runs), ".4f"),
        largest("residual_mean", ".1e"),
        largest("residual_samples", ".1e"),
        average((run.get("passes") for run in runs), ".1f"),
        average((run["seconds"]["prior_draws"] for run in runs), ".1f"),
        average((run["seconds"]["solve"] for run in runs), ".1f"),
        average((run["seconds"]["prediction"] for run in runs), ".1f"),
        largest("peak_rss_mb", ".0f"),
        reasons,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables of a results folder."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.uci.table", description="Tables of stored results."
    )
    parser.add_argument("results", type=Path, nargs="?", default=Path("results"))
    options = parser.parse_args(arguments)
    try:
        print(summary(read_results(options.results)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
