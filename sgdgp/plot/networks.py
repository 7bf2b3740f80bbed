"""Whether classes are as likely as a network says."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.metrics import reliability_diagram
from sgdgp.plot.axes import Axes, axes_of, check_axes, unit_square

__all__ = ["reliability"]

_LARGEST = 60
"""Area of the marker of the fullest bin, in square points."""


def reliability(
    probabilities: Float[Tensor, "n C"],
    labels: Int[Tensor, " n"],
    *,
    bins: int = 15,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Reliability diagram: accuracy against confidence, in bins of equal width.

    A curve below the diagonal is too sure. Areas of markers are as the number of points
    in the bins.

    Args:
        probabilities: Predicted class probabilities (n, C), rows sum to one.
        labels: Observed classes (n,).
        bins: How many. Default: 15.
        label: Name of the curve. Default: none, and the title has the expected
            calibration error.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: As ``sgdgp.metrics.reliability_diagram``.
        ValueError: The same, where ``labels`` are its y.

    Example:
        >>> sgdgp.plot.networks.reliability(posterior.predict(x_test), y_test)
    """
    check_axes(ax)
    diagram = reliability_diagram(probabilities, labels, bins)
    some = diagram.counts > 0
    confidence, accuracy = diagram.confidence[some].cpu(), diagram.accuracy[some].cpu()
    sizes = _LARGEST * (diagram.counts[some] / diagram.counts.max()).cpu()
    ax = axes_of(ax, 4.2, 4.2)
    error = f"{diagram.error:.3f}"
    (line,) = ax.plot(confidence, accuracy, lw=1, zorder=3)
    style: dict[str, Any] = {"color": line.get_color(), "zorder": 4, "clip_on": False}
    ax.scatter(confidence, accuracy, s=sizes.clamp_min(4), **style)
    unit_square(ax)
    ax.set(xlabel="confidence", ylabel="accuracy")
    if label is None:
        ax.set_title(f"expected calibration error {error}, n = {len(labels):,}")
    else:
        line.set_label(f"{label}, ECE {error}")
        ax.legend(fontsize="small")
    return ax
