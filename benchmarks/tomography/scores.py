"""How well means and variances of pixels, or samples, tell a true image."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sgdgp.metrics import interval_coverage
from sgdgp.tomography import ImagePosterior
from sgdgp.tomography.posterior import RESOLUTION, patches_of

PATCHES = (1, 2, 5)
"""Sides of patches."""


def psnr(image: Tensor, truth: Tensor, peak: float | None = None) -> float:
    """Peak signal-to-noise ratio in dB, by a peak or the range of the truth."""
    error = float((image - truth).double().square().mean())
    return 10 * math.log10((peak or _range(truth)) ** 2 / error)


def oracle(image: Tensor, truth: Tensor) -> float:
    """Log density by pixel with the one variance that is best for this truth."""
    error = float((image - truth).double().square().mean())
    return -0.5 * (math.log(2 * math.pi * error) + 1)


def pixel_scores(mean: Tensor, deviation: Tensor, truth: Tensor) -> dict[str, float]:
    """PSNR, log density by pixel, 95 % coverage, correlation of error and deviation.

    Args:
        mean: Of the image.
        deviation: Standard deviation of every pixel.
        truth: The image.
    """
    error, variance = (truth - mean).double(), deviation.double().square()
    each = error.square() / variance + variance.log() + math.log(2 * math.pi)
    pair = torch.stack([error.abs().flatten(), deviation.double().flatten()])
    y = (mean.double().flatten(), variance.flatten(), truth.double().flatten())
    return {
        "psnr": psnr(mean, truth),
        "log density": -0.5 * float(each.mean()),
        "coverage": interval_coverage(*y, 0.95),
        "correlation": float(torch.corrcoef(pair)[0, 1]),
    }


def posterior_scores(posterior: ImagePosterior, truth: Tensor) -> dict[str, Any]:
    """Those of a posterior, and log densities of patches."""
    return {
        **pixel_scores(posterior.mean, posterior.standard_deviation, truth),
        "patches": {
            str(side or "image"): posterior.log_density(truth, side)
            for side in (*PATCHES, None)
        },
    }


def sample_scores(samples: Tensor, truth: Tensor) -> dict[str, Any]:
    """Those of images that another method draws (k, *image_shape).

    Every pixel has the variance on its own that it has in posteriors. Of the
    covariances of patches, those between pixels are halved, as they are there.
    """
    mean, count = samples.mean(0), len(samples)
    own = (RESOLUTION * _range(mean)) ** 2
    fluctuations = (samples - mean).double() * math.sqrt(count / (count - 1))
    variance, error = fluctuations.square().mean(0) + own, (truth - mean).double()

    def log_density(side: int) -> float:
        total = 0.0
        for pixels in patches_of(truth, side):
            some = fluctuations.flatten(1)[:, pixels]
            inside = some.mT @ some / (2 * count)
            inside.diagonal().mul_(2).add_(own)
            normal = torch.distributions.MultivariateNormal(
                torch.zeros(len(pixels), dtype=torch.float64), inside
            )
            total += float(normal.log_prob(error.flatten()[pixels]))
        return total / truth.numel()

    return {
        **pixel_scores(mean, variance.sqrt(), truth),
        "patches": {str(side): log_density(side) for side in PATCHES},
    }


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    """Mean and standard error, in words."""
    x = torch.tensor(values, dtype=torch.float64)
    error = f" ± {float(x.std()) / len(x) ** 0.5:.{digits}f}" if len(x) > 1 else ""
    return f"{float(x.mean()):.{digits}f}{error}"


def _range(truth: Tensor) -> float:
    return float(truth.max() - truth.min())
