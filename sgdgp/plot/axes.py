"""Axes to draw into, and what several figures have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

_DIAGONAL = "sgdgp-diagonal"


def check_axes(ax: Axes | None) -> None:
    """Refuse what cannot be drawn into, before anything is computed.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: ``ax`` is no axes.
    """
    try:
        from matplotlib.axes import Axes
    except ImportError as error:
        raise ImportError(
            "sgdgp.plot needs matplotlib; install it with pip install 'sgdgp[plot]'"
        ) from error
    if ax is not None and not isinstance(ax, Axes):
        raise TypeError(
            f"ax: expected matplotlib's Axes or None, found {type(ax).__name__}"
        )


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    """These axes, or new ones in a figure of so many inches."""
    if ax is not None:
        return ax
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")[1]


def unit_square(ax: Axes) -> None:
    """Axes of two probabilities, with one diagonal however many curves there are."""
    if not any(line.get_gid() == _DIAGONAL for line in ax.get_lines()):
        ax.plot([0, 1], [0, 1], "--", color="0.4", lw=0.8, zorder=1, gid=_DIAGONAL)
    ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
