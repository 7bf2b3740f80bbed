"""Figures of what has been measured: scores against n, and of the first task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.learned_priors.priors import Record
from benchmarks.learned_priors.table import Results
from benchmarks.uci.columns import mean_and_error

_SCORES = {
    "nll": "test NLL",
    "ece": "calibration error",
    "accuracy": "accuracy",
    "bound": "bound",
}
_DRAWN = ("regression", "fewshot", "continual")
_COLOURS = {
    "learned": "#1f77b4",
    "strength 1": "#17becf",
    "isotropic": "#ff7f0e",
    "g-prior": "#2ca02c",
    "fine-tuning": "#777777",
    "EWC": "#9467bd",
}


def draw(results: Results, folder: Path) -> list[Path]:
    """One PNG file for each set.

    Returns:
        Their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    paths = []
    for row, sets in results.items():
        for name, records in sets.items() if row in _DRAWN else ():
            curves = _curves(records)
            figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
            places = figure.subplots(1, len(curves), squeeze=False)[0]
            for axes, (score, methods) in zip(places, curves.items(), strict=True):
                for method, curve in methods.items():
                    found = [mean_and_error(values) for values in curve.values()]
                    axes.errorbar(
                        list(curve),
                        [mean for mean, _ in found],
                        [error or 0.0 for _, error in found],
                        label=method,
                        color=_COLOURS[method],
                        capsize=2,
                    )
                axes.set_ylabel(_SCORES[score])
                if row == "continual":
                    axes.set_xlabel("tasks seen")
                else:
                    axes.set_xlabel("examples" + " a class" * (row == "fewshot"))
                    axes.set_xscale("log")
            places[0].legend(fontsize="small")
            path = folder / f"{row}-{name}.png"
            figure.savefig(path, dpi=80)
            paths.append(path)
    return paths


def _curves(records: Sequence[Record]) -> dict[str, dict[str, dict[int, list[float]]]]:
    """Values over seeds by score, method and n, or tasks seen."""
    found: dict[str, dict[str, dict[int, list[float]]]] = {}
    for record in records:
        points = [(record.get("n", 0), record)]
        if "after" in record:
            points = [(k + 1, after[0]) for k, after in enumerate(record["after"])]
        for at, scores in points:
            for score in _SCORES.keys() & scores.keys():
                curve = found.setdefault(score, {}).setdefault(record["method"], {})
                curve.setdefault(at, []).append(scores[score])
    return {score: found[score] for score in _SCORES if score in found}
