"""Figures of a race: true residual against passes and against seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Point = tuple[float, float, float]
"""Passes, seconds, mean true residual."""


def curve_of(
    trace: Mapping[str, Any] | None, runs: Sequence[Mapping[str, Any]]
) -> list[Point]:
    """The residual on the way.

    From the traced run where the contender lets itself be watched, else one point
    for each tolerance that it was run to.
    """
    if trace and len(trace.get("curve") or []) > 1:
        points = [(p["passes"], p["seconds"], p["mean"]) for p in trace["curve"]]
    else:
        points = [
            (run["passes"], run["seconds"], (run.get("true") or {}).get("mean"))
            for run in runs
        ]
    kept = [p for p in points if all(value is not None and value > 0 for value in p)]
    return sorted(kept)


def plot_race(
    path: Path,
    title: str,
    curves: Mapping[str, Sequence[Point]],
    tolerances: Sequence[float],
) -> Path:
    """Draw the figure of one problem.

    Args:
        path: The file to write.
        title: What stands above it.
        curves: Of every contender.
        tolerances: Drawn as lines; what is far below the smallest (a direct solve)
            is drawn at the lower edge.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    try:  # here, so that the benchmark runs without matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(11, 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    labels = ("passes over K", "seconds")
    floor = 0.2 * min(tolerances)
    for clock, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        for index, (name, points) in enumerate(curves.items()):
            axes.plot(
                [point[clock] for point in points],
                [max(point[2], 1.2 * floor) for point in points],
                label=name,
                color=f"C{index % 10}",
                linestyle="-" if index < 10 else "--",
                marker=".",
                markersize=4,
                linewidth=1.2,
            )
        for tolerance in tolerances:
            axes.axhline(tolerance, color="black", linewidth=0.5, linestyle=":")
        axes.set(xlabel=label, xscale="log", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.2)
    # A method that diverges must not squeeze the others.
    panels[0].set_ylim(top=3.0, bottom=floor)
    panels[0].set_ylabel("true relative residual, mean over columns")
    panels[1].legend(fontsize="small")
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path
