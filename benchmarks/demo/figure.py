"""The demo's figure: data, mean, band, sample functions, the gap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.demo.problem import GAP, Problem

_SHOWN = 2000
_DATA, _POSTERIOR, _SAMPLES, _TRUTH = "#9aa0a6", "#1f5fa8", "#d9822b", "#111111"


def draw_posterior(
    axes: Any,
    problem: Problem,
    mean: Tensor,
    variance: Tensor,
    functions: Tensor,
) -> None:
    """Draw one posterior into matplotlib axes.

    Args:
        axes: Where to draw.
        problem: Data and truth.
        mean: Posterior mean (m,) at the test points.
        variance: Variance of the function (m,).
        functions: A few sample functions (s, m).
    """
    t = problem.x_test[:, 0].numpy()
    mean, half = mean.cpu(), 1.96 * variance.sqrt().cpu()
    shown = torch.linspace(0, len(problem.x) - 1, min(_SHOWN, len(problem.x))).long()

    axes.axvspan(*GAP, color="#f1efe8", zorder=0, label="gap: no data")
    axes.plot(
        problem.x[shown, 0],
        problem.y[shown],
        ".",
        color=_DATA,
        markersize=2,
        alpha=0.45,
        zorder=1,
        rasterized=True,
        label=f"data ({len(shown):,} of {len(problem.x):,} shown)",
    )
    axes.fill_between(
        t,
        mean - half,
        mean + half,
        color=_POSTERIOR,
        alpha=0.22,
        linewidth=0,
        zorder=2,
        label="95 % band of the function",
    )
    for i, values in enumerate(functions):
        axes.plot(
            t,
            values.cpu(),
            color=_SAMPLES,
            linewidth=0.9,
            alpha=0.9,
            zorder=3,
            label=f"{len(functions)} sample functions" if i == 0 else None,
        )
    axes.plot(t, mean, color=_POSTERIOR, linewidth=2.0, zorder=4, label="mean")
    axes.plot(
        t,
        problem.f_test,
        color=_TRUTH,
        linestyle=(0, (4, 2)),
        linewidth=1.1,
        zorder=5,
        label="true function",
    )
    axes.set(xlabel="x", ylabel="f(x)", xlim=(t[0], t[-1]))
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(
    path: Path,
    problem: Problem,
    title: str,
    mean: Tensor,
    variance: Tensor,
    functions: Tensor,
) -> None:
    """Write the figure: the whole domain, and the gap enlarged beside it.

    Args:
        path: Where it goes; the folder is made.
        problem: Data and truth.
        title: Line above the figure.
        mean: Posterior mean (m,) at the test points.
        variance: Variance of the function (m,).
        functions: A few sample functions (s, m).

    Raises:
        ValueError: Matplotlib is not installed.
    """
    try:  # here, so that everything but the figure runs without matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(
            "the figure needs matplotlib: pip install matplotlib"
        ) from error
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    whole, near = figure.subplots(1, 2, width_ratios=(2.2, 1), sharey=True)
    for axes in (whole, near):
        draw_posterior(axes, problem, mean, variance, functions)
    margin = 0.6
    near.set(xlim=(GAP[0] - margin, GAP[1] + margin), ylabel="", title="around the gap")
    whole.set_title(title)
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
