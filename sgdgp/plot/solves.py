"""How the residuals of a solve fell."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from sgdgp.plot.axes import Axes, axes_of, check_axes
from sgdgp.posterior.paths import SampleFunctions
from sgdgp.posterior.posterior import Posterior
from sgdgp.solvers import Solution
from sgdgp.solvers.base import HistoryEntry


def convergence(
    solution: Solution | Posterior | SampleFunctions,
    *,
    tolerance: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Relative residual of every column against passes over the kernel matrix.

    The mean's is drawn apart from the samples'. Lines are what the solver went by,
    mostly estimates that cost nothing; dots are true residuals.

    Args:
        solution: A solution, whose first column is taken for the mean; or a posterior,
            or functions that were drawn later, which know their columns.
        tolerance: Where to draw a line. Default: that of the posterior's solver; none
            for a solution, which does not know it.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``solution`` is none.

    Example:
        >>> sgdgp.plot.convergence(posterior)
    """
    check_axes(ax)
    found = solution if isinstance(solution, Solution) else None
    each = None  # columns from one mean to the next
    if isinstance(solution, Posterior):
        found, each = solution.solution, 1 + solution.num_samples
        if tolerance is None:
            tolerance = solution.problem.solver.limits.tolerance
    elif isinstance(solution, SampleFunctions):
        found = solution.solution
    if found is None:
        raise TypeError(
            "solution: expected a Solution or a posterior of sgdgp.condition, found "
            f"{type(solution).__name__}"
        )
    history = found.history or (
        HistoryEntry(found.passes, 0.0, tuple(found.residuals.tolist()), True),
    )
    ax = axes_of(ax, 6.0, 3.6)
    # Outputs with rows of their own were solved one after another.
    for width, entries in groupby(history, lambda entry: len(entry.residuals)):
        if isinstance(solution, SampleFunctions):
            means = torch.zeros(width, dtype=torch.bool, device="cpu")
        else:
            means = torch.arange(width, device="cpu") % (each or width) == 0
        _draw(ax, list(entries), means)
    if tolerance is not None:
        ax.axhline(
            tolerance, color="0.4", ls=":", lw=1.2, label=f"tolerance {tolerance:g}"
        )
    ax.set(
        yscale="log",
        xlabel="passes over K",
        ylabel="relative residual",
        title=f"{found.solver} on {found.operator}: {found.reason}",
    )
    ax.set_xlim(left=0.0)
    ax.legend(fontsize="small")
    return ax


def _draw(ax: Axes, entries: list[HistoryEntry], means: Tensor) -> None:
    """Lines of some columns' residuals, those of means (k,) on top."""
    wide: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    passes = torch.tensor([entry.passes for entry in entries], **wide)
    residuals = torch.tensor([entry.residuals for entry in entries], **wide)
    exact = torch.tensor([entry.exact for entry in entries], device="cpu")
    drawn = {line.get_label() for line in ax.get_lines()}
    for chosen, name, colour, width, order in (
        (means, "mean", "C1", 1.8, 3),
        (~means, "sample", "C0", 0.7, 2),
    ):
        columns = residuals[:, chosen]
        count = columns.shape[1]
        if count == 0:
            continue
        style: dict[str, Any] = {"color": colour, "zorder": order}
        style["alpha"] = 0.5 if name == "sample" else 1.0
        lines = ax.plot(passes, columns, lw=width, **style)
        dots = ax.plot(passes[exact], columns[exact], "o", ms=1 + 2 * width, **style)
        for label, line in (
            (name if count == 1 else f"{count} {name}s", lines[0]),
            ("true residuals", dots[0]),
        ):
            if label not in drawn:
                line.set_label(label)
                drawn.add(label)
