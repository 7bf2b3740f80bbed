"""What fits cost and are worth: the library's and its peers' in one table."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.uci.columns import (
    Result,
    average,
    format_rows,
    grouped,
    largest,
    row_label,
)

_HEADER = (
    "data set",
    "run",
    "splits",
    "rows",
    "RMSE",
    "NLL",
    "RMSE (exact)",
    "NLL (exact)",
    "log p(y) / n",
    "steps",
    "passes",
    "start s",
    "fit s",
    "other s",
    "CPU s",
    "peak MB",
    "fit ended",
)
_LEARNING = ("initialise", "fit")


def comparison(fits: Sequence[Result]) -> str:
    """One line per data set and run, means over splits.

    "(exact)" is the float64 posterior at the hyperparameters that were learnt, and
    log p(y) / n their log marginal likelihood per training row.
    """
    rows: list[tuple[str, ...]] = [_HEADER]
    for name, group in grouped(fits, lambda result: str(result["dataset"])):
        for label, runs in grouped(group, _label):
            rows.append((name, label, *_cells(runs)))
    return (
        "Learnt hyperparameters, means over splits (memory: the largest)\n"
        + format_rows(rows)
    )


def _label(result: Result) -> str:
    # All of them are fits here.
    label = row_label(result).replace("hyperparameters fit, ", "")
    return label.replace(" (hyperparameters fit)", "")


def _cells(runs: Sequence[Result]) -> tuple[str, ...]:
    exact = [run.get("exact") or {} for run in runs]
    fits = [run["fit"] for run in runs]
    return (
        ",".join(str(run["split"]) for run in runs),
        average((run.get("rows", run["n"]) for run in runs), ".0f"),
        average((run["rmse"] for run in runs), ".4f"),
        average((run["nll"] for run in runs), "+.4f"),
        average((found.get("rmse") for found in exact), ".4f"),
        average((found.get("nll") for found in exact), "+.4f"),
        average((found.get("log_likelihood_per_row") for found in exact), "+.4f"),
        average((fit["steps"] for fit in fits), ".0f"),
        average((fit.get("passes") for fit in fits), ".0f"),
        average((run["seconds"].get("initialise") for run in runs), ".1f"),
        average((run["seconds"]["fit"] for run in runs), ".1f"),
        average((_other_seconds(run) for run in runs), ".1f"),
        average((run.get("cpu_seconds") for run in runs), ".1f"),
        largest((run.get("peak_rss_mb") for run in runs), ".0f"),
        "; ".join(dict.fromkeys(str(fit["reason"]) for fit in fits)),
    )


def _other_seconds(run: Result) -> float:
    phases = run["seconds"].items()
    return sum(value for phase, value in phases if phase not in _LEARNING)
