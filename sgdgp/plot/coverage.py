"""Whether predictive intervals hold as many targets as they say."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgdgp.metrics import CALIBRATION_LEVELS, calibration_error, interval_coverage
from sgdgp.networks import LinearisedPosterior
from sgdgp.plot.axes import Axes, axes_of, check_axes, unit_square
from sgdgp.plot.functions import AnyPosterior, check_posterior, values_at


def calibration(
    p: AnyPosterior,
    x: Any,
    y: Tensor,
    *,
    observation_noise: Tensor | float | None = None,
    label: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Observed against expected coverage of central intervals, with noise.

    A curve above the diagonal is one of intervals that are too wide, below it too
    narrow. In the grey band are nineteen of twenty points of a calibrated posterior
    whose errors are independent.

    Args:
        p: A posterior.
        x: Inputs that it was not conditioned on, as its ``predict`` takes them.
        y: Their targets (n',), of several outputs (n', T); NaN where there is none.
        observation_noise: Noise variances of y, as ``predict`` takes them: a number,
            (n',) or (n', T). Default: the likelihood's.
        label: Name of the curve. Default: none, and the title has the error.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: Shapes or values do not fit, or the likelihood only knows the noise
            of its training points.

    Example:
        >>> sgdgp.plot.calibration(posterior, x_test, y_test)
    """
    check_axes(ax)
    check_posterior(p)
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a torch.Tensor, found {type(y).__name__}")
    mean, variance = _targets_at(p, x, observation_noise)
    y = y.detach().cpu()
    if y.shape not in (mean.shape, mean.squeeze(-1).shape):
        raise ValueError(
            f"y: expected targets {tuple(mean.squeeze(-1).shape)} at x, found "
            f"{tuple(y.shape)}"
        )
    y = y.reshape(mean.shape)
    curves = []
    for k in range(mean.shape[1]):
        known = ~y[:, k].isnan()
        own = mean[known, k], variance[known, k], y[known, k]
        covered = [interval_coverage(*own, level) for level in CALIBRATION_LEVELS]
        curves.append((covered, calibration_error(*own), int(known.sum())))
    ax = axes_of(ax, 4.2, 4.2)
    _draw_chance(ax, min(count for *_, count in curves))
    for k, (covered, error, count) in enumerate(curves):
        names = [label] if label else []
        names += [f"output {k}"] if len(curves) > 1 else []
        shown = f"{', '.join([*names, ''])}error {error:.3f}" if names else None
        ax.plot(CALIBRATION_LEVELS, covered, "o-", ms=3, label=shown)
        if not names:
            ax.set_title(f"calibration error {error:.3f}, n = {count:,}")
    unit_square(ax)
    ax.set(xlabel="expected coverage", ylabel="observed coverage")
    if ax.get_legend_handles_labels()[1]:
        ax.legend(fontsize="small")
    return ax


def _targets_at(
    p: AnyPosterior, x: Any, noise: Tensor | float | None
) -> tuple[Tensor, Tensor]:
    """Means and variances of observed targets (n, T)."""
    if not isinstance(p, LinearisedPosterior):
        return values_at(p, x, observation_noise=True if noise is None else noise)
    mean, variance = values_at(p, x)
    known = torch.as_tensor(p.noise if noise is None else noise).to(variance)
    if noise is not None and known.shape not in ((), mean.shape, mean.shape[:1]):
        raise ValueError(
            f"observation_noise: expected a number or variances {tuple(mean.shape)}, "
            f"found {tuple(known.shape)}"
        )
    of_points = noise is not None and known.ndim == 1
    return mean, variance + (known.unsqueeze(1) if of_points else known)


def _draw_chance(ax: Axes, count: int) -> None:
    """Two standard errors of the coverage of so many independent points."""
    levels = torch.linspace(0, 1, 101, device="cpu")
    half = 2 * (levels * (1 - levels) / count).sqrt()
    ax.fill_between(
        levels, levels - half, levels + half, color="0.5", alpha=0.15, lw=0, zorder=0
    )
