"""The figure: best value against seconds and against steps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.thompson_sampling.comparison import Comparison, Result, comparisons
from benchmarks.thompson_sampling.methods import METHODS, RANDOM
from benchmarks.thompson_sampling.store import request_of
from benchmarks.uci.columns import mean_and_error


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw ``best.png``, and ``best-1.png``, ... for further tables.

    Args:
        results: Stored results.
        folder: Where the figures go.

    Returns:
        The files written.

    Raises:
        ValueError: Matplotlib is not installed.
    """
    paths = []
    for number, group in enumerate(comparisons(results)):
        if group.problems:
            suffix = f"-{number}" if number else ""
            paths.append(_figure(folder / f"best{suffix}.png", group))
    return paths


def _figure(path: Path, group: Comparison) -> Path:
    try:  # here, so that the benchmark runs without matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    known = list(METHODS)
    for name in group.methods:
        runs = group.runs(name)
        request = request_of(runs[0])
        style = {
            "color": f"C{known.index(request.method)}",
            "linestyle": "--" if request.kept else "-",
        }
        seconds, steps, means, errors = curve(runs)
        low = [mean - error for mean, error in zip(means, errors, strict=True)]
        high = [mean + error for mean, error in zip(means, errors, strict=True)]
        for axes, x in ((left, seconds), (right, steps)):
            if axes is left and request.method == RANDOM:
                # It takes no time: a level for the others to be seen against.
                axes.axhline(means[-1], color=style["color"], linestyle=":")
                continue
            axes.plot(x, means, label=name, marker=".", **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15)
    left.set(xlabel="seconds: draws, solve and maximisation", ylabel="best value")
    right.set(xlabel="steps")
    right.legend(fontsize="small")
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.2)
    figure.suptitle(f"{group.title} ({len(group.problems)} problems)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def curve(
    runs: Sequence[Result],
) -> tuple[list[float], list[int], list[float], list[float]]:
    """Mean seconds, steps, mean best values and the standard errors of their gains.

    The errors are those of the gain over the start: how good the start is differs
    from problem to problem, and is the same for every method.
    """
    seconds, steps = [0.0], [0]
    means, errors = [mean_and_error([run["start"] for run in runs])[0]], [0.0]
    for entries in zip(*(run["history"] for run in runs), strict=True):
        steps.append(int(entries[0]["step"]))
        seconds.append(mean_and_error([e["spent_seconds"] for e in entries])[0])
        means.append(mean_and_error([e["best"] for e in entries])[0])
        gains = [
            entry["best"] - run["start"]
            for entry, run in zip(entries, runs, strict=True)
        ]
        errors.append(mean_and_error(gains)[1] or 0.0)
    return seconds, steps, means, errors
