"""Step size and momentum of stochastic dual descent from spectral estimates.

Everything refers to the matrix scaled to unit diagonal, D^-1/2 H D^-1/2 with
D = diag(H) and H = K + Sigma: for stationary kernels a constant, for others what
keeps a few large rows from setting the step of all. With look-ahead momentum rho
and block size b, random-coordinate descent with step beta is stable when

    beta < 2 (1 + rho) / ((1 + 2 rho) lambda_1)      (mean dynamics)
    beta < 2 (1 - rho) / (n / b - 1)                 (sampling noise)

The first falls slowly in rho, the second vanishes as rho -> 1. Momentum is set
where the two meet up to a constant, rho = 1 - (2/3) (n / b - 1) / lambda_1, but
never above the optimum of deterministic acceleration, (1 - q) / (1 + q) with
q = sqrt(lambda_n / lambda_1); the step is a fixed fraction of the smaller limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgdgp.solvers.system import System

_SUBSET = 1000
_POWER_ITERATIONS = 20


@dataclass(frozen=True)
class Spectrum:
    """What the step rules need to know of H = K + Sigma scaled to unit diagonal.

    Attributes:
        largest: Estimate of the largest eigenvalue; errs on the high side.
        smallest: Lower bound of the smallest eigenvalue.
        diagonal: The diagonal of H itself (n, 1).
    """

    largest: float
    smallest: float
    diagonal: Tensor


@dataclass(frozen=True)
class StepRule:
    """Step size and momentum for one block size."""

    step_size: float
    momentum: float


def estimate_spectrum(system: System, generator: torch.Generator) -> Spectrum:
    """Estimate the spectrum from a random subset of at most 1,000 points.

    lambda_1(K) is close to (n / m) lambda_1(K_mm); the residual of the power
    iteration is added as a safety margin (Kuczynski & Wozniakowski, 1992).
    """
    n = system.n
    size = min(n, _SUBSET)
    subset = torch.randperm(n, generator=generator, device=generator.device)[:size]
    subset = subset.to(system.rhs.device)
    diagonal = system.operator.diagonal().unsqueeze(1) + system.noise
    scale = diagonal[subset].rsqrt()
    matrix = system.operator.block(subset, subset) * scale * scale.mT
    vector = torch.randn(
        size, 1, generator=generator, device=generator.device, dtype=matrix.dtype
    ).to(matrix.device)
    vector /= vector.norm()
    eigenvalue, image = 0.0, matrix @ vector
    for _ in range(_POWER_ITERATIONS):
        vector = image / image.norm().clamp_min(torch.finfo(matrix.dtype).tiny)
        image = matrix @ vector
        eigenvalue = float((vector * image).sum())
    margin = float((image - eigenvalue * vector).norm())
    ratio = system.noise / diagonal
    largest = (n / size) * (eigenvalue + margin) + float(ratio.max())
    return Spectrum(
        # lambda_1 is at least the mean diagonal, whatever a small subset says.
        largest=max(largest, 1.0),
        smallest=float(ratio.min()),
        diagonal=diagonal,
    )


def step_rule(
    spectrum: Spectrum,
    n: int,
    block_size: int,
    *,
    momentum: float | None = None,
    fraction: float = 0.5,
) -> StepRule:
    """Momentum and step size for a block size, from the two stability limits.

    Args:
        spectrum: Spectral estimates of H.
        n: Number of equations.
        block_size: Coordinates per step.
        momentum: Fixed momentum in [0, 1). Default: set from the spectrum.
        fraction: Part of the smaller stability limit that is used.
    """
    spread = n / block_size - 1.0
    q = math.sqrt(min(1.0, spectrum.smallest / spectrum.largest))
    if momentum is None:
        balanced = 1.0 - (2.0 / 3.0) * spread / spectrum.largest
        momentum = min(max(balanced, 0.0), 0.999, (1.0 - q) / (1.0 + q))
    mean_limit = 2.0 * (1.0 + momentum) / ((1.0 + 2.0 * momentum) * spectrum.largest)
    noise_limit = math.inf
    if spread > 0:
        noise_limit = 2.0 * (1.0 - momentum) / spread
    return StepRule(fraction * min(mean_limit, noise_limit), momentum)
