"""Figures: test RMSE and residual against passes and seconds, one per data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.uci.store import request_of
from benchmarks.uci.table import row_label

_AXES = (
    ("rmse", "passes", "test RMSE"),
    ("rmse", "seconds", "test RMSE"),
    ("residual_mean", "passes", "relative residual"),
    ("residual_mean", "seconds", "relative residual"),
)
_X_LABELS = {"passes": "passes over K", "seconds": "seconds of the solve"}


def plot_results(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Draw ``DATASET.png`` (``DATASET-noise-SCALE.png`` for low-noise runs).

    One colour per solver, one line per split; the residual of the mean is solid,
    the largest of the samples dotted; the exact RMSE of each split is dashed.

    Args:
        folder: Where the figures go.
        results: Stored results with their curves.

    Returns:
        The files written.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        noise = request_of(result).noise_scale
        suffix = "" if noise is None else f"-noise-{noise:g}"
        groups.setdefault(f"{result['dataset']}{suffix}", []).append(result)
    return [_figure(folder / f"{name}.png", group) for name, group in groups.items()]


def _figure(path: Path, results: Sequence[Mapping[str, Any]]) -> Path:
    try:  # here, so that the benchmark runs without matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    solves = [result for result in results if result.get("curve")]
    labels = list(dict.fromkeys(row_label(result) for result in solves))
    exact = {
        result["split"]: result["rmse"]
        for result in results
        if request_of(result).solver == "exact"
    }
    panels = figure.subplots(2, 2).ravel()
    for axes, (quantity, clock, y_label) in zip(panels, _AXES, strict=True):
        for result in solves:
            label = row_label(result)
            first = next(r for r in solves if row_label(r) == label) is result
            _line(
                axes, result, quantity, clock, f"C{labels.index(label)}", label, first
            )
        if quantity == "rmse":
            for value in exact.values():
                axes.axhline(value, color="black", linestyle="--", linewidth=0.8)
        axes.set(xlabel=_X_LABELS[clock], ylabel=y_label, xscale="log", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.2)
    if labels:
        panels[0].legend(fontsize="small")
    splits = sorted({result["split"] for result in results})
    figure.suptitle(
        f"{path.stem}, splits {', '.join(map(str, splits))}"
        + (" (dashed: exact)" if exact else "")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _line(
    axes: Any,
    result: Mapping[str, Any],
    quantity: str,
    clock: str,
    color: str,
    label: str,
    first: bool,
) -> None:
    style = {"color": color, "marker": ".", "linewidth": 1.0, "markersize": 4}
    x, y = _positive(result["curve"], clock, quantity)
    axes.plot(x, y, label=label if first else None, **style)
    if quantity == "residual_mean":
        x, y = _positive(result["curve"], clock, "residual_samples")
        axes.plot(x, y, linestyle=":", color=color, linewidth=1.0)


def _positive(
    points: Sequence[Mapping[str, Any]], x: str, y: str
) -> tuple[list[float], list[float]]:
    """What can be drawn on logarithmic axes; a start at zero passes cannot."""
    kept = [point for point in points if (point[x] or 0) > 0 and (point[y] or 0) > 0]
    return [point[x] for point in kept], [point[y] for point in kept]
