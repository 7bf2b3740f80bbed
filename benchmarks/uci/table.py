"""Tables of stored results: ``python -m benchmarks.uci.table RESULTS``.

RMSE and NLL as mean over splits ± standard error (sample standard deviation over
sqrt(number of splits)), data sets as columns, published rows above one's own; then
one line per data set and solver with everything else.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.uci.columns import (
    DASH,
    Result,
    average,
    format_figure,
    format_rows,
    grouped,
    largest,
    mean_and_error,
    row_label,
)
from benchmarks.uci.comparison import comparison
from benchmarks.uci.reference import LOW_NOISE_SCALE, Published, published_rows
from benchmarks.uci.store import read_results, request_of

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


def one_line(result: Result) -> str:
    """What is told of a run when it ends."""
    figures = [
        f"{name} {DASH if result.get(name) is None else format(result[name], form)}"
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
    fits = [result for result in results if result.get("fit")]
    if fits:
        parts.append(comparison(fits))
    solves = [result for result in results if not request_of(result).is_peer]
    if solves:
        parts.append(_details(solves))
    return "\n\n".join(parts) + "\n"


def _metric_table(results: Sequence[Result], metric: str, low_noise: bool) -> str:
    datasets = list(dict.fromkeys(str(result["dataset"]) for result in results))
    rows = [["", *datasets]]
    for label, figures in published_rows(metric, low_noise=low_noise).items():
        if any(name in figures for name in datasets):
            rows.append([label, *(_published(figures.get(name)) for name in datasets)])
    for label, group in grouped(results, row_label):
        cells = dict(grouped(group, lambda result: str(result["dataset"])))
        rows.append(
            [label, *(_measured(cells.get(name, []), metric) for name in datasets)]
        )
    return format_rows(rows)


def _published(figure: Published | None) -> str:
    if figure is None:
        return DASH
    return format_figure(figure.value, figure.error, _digits(figure.value))


def _digits(value: float) -> int:
    """As many decimals as were printed: two, or four."""
    return 2 if math.isclose(value, round(value, 2), abs_tol=1e-9) else 4


def _measured(results: Sequence[Result], metric: str) -> str:
    """Mean and error over splits, and how many there are; missing ones are named."""
    values = [result[metric] for result in results if result.get(metric) is not None]
    if not results:
        return DASH
    if len(values) < len(results):
        return f"failed on {len(results) - len(values)} of {len(results)}"
    return f"{format_figure(*mean_and_error(values))} [{len(values)}]"


def _details(results: Sequence[Result]) -> str:
    rows: list[tuple[str, ...]] = [_DETAIL_HEADER]
    for name, group in grouped(results, lambda result: str(result["dataset"])):
        for label, runs in grouped(group, row_label):
            rows.append(_detail_row(name, label, runs))
    return (
        "Details, means over splits (residuals, memory: the largest)\n"
        + format_rows(rows)
    )


def _detail_row(name: str, label: str, runs: Sequence[Result]) -> tuple[str, ...]:
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
        largest((run.get("residual_mean") for run in runs), ".1e"),
        largest((run.get("residual_samples") for run in runs), ".1e"),
        average((run.get("passes") for run in runs), ".1f"),
        average((run["seconds"]["prior_draws"] for run in runs), ".1f"),
        average((run["seconds"]["solve"] for run in runs), ".1f"),
        average((run["seconds"]["prediction"] for run in runs), ".1f"),
        largest((run.get("peak_rss_mb") for run in runs), ".0f"),
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
