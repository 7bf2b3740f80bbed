"""Step size and momentum of stochastic dual descent from spectral estimates.

With look-ahead momentum rho, block size b and h the mean diagonal of
H = K + Sigma, random-coordinate descent with step beta is stable when

    beta < 2 (1 + rho) / ((1 + 2 rho) lambda_1)      (mean dynamics)
    beta < 2 (1 - rho) / ((n / b - 1) h)             (sampling noise)

The first falls slowly in rho, the second vanishes as rho -> 1. Momentum is set
where the two meet up to a constant, rho = 1 - (2/3) n h / (b lambda_1), but never
above the optimum of deterministic acceleration, (1 - q) / (1 + q) with
q = sqrt(sigma^2 / lambda_1); the step is a fixed fraction of the smaller limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from sgdgp.solvers.system import System

_SUBSET = 1000
_POWER_ITERATIONS = 20


@dataclass(frozen=True)
class Spectrum:
    """What the step rules need to know of H = K + Sigma.

    Attributes:
        largest: Estimate of the largest eigenvalue; errs on the high side.
        smallest: Lower bound of the smallest eigenvalue, the smallest noise.
        diagonal: Mean of the diagonal.
        largest_diagonal: Largest entry of the diagonal.
    """

    largest: float
    smallest: float
    diagonal: float
    largest_diagonal: float


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
    matrix = system.operator.block(subset, subset)
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
    diagonal = system.operator.diagonal() + system.noise[:, 0]
    largest = (n / size) * (eigenvalue + margin) + float(system.noise.max())
    return Spectrum(
        # lambda_1 is at least the mean diagonal, whatever a small subset says.
        largest=max(largest, float(diagonal.mean())),
        smallest=float(system.noise.min()),
        diagonal=float(diagonal.mean()),
        largest_diagonal=float(diagonal.max()),
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
    height = max(spectrum.diagonal, 0.5 * spectrum.largest_diagonal)
    q = math.sqrt(min(1.0, spectrum.smallest / spectrum.largest))
    if momentum is None:
        balanced = 1.0 - (2.0 / 3.0) * spread * height / spectrum.largest
        momentum = min(max(balanced, 0.0), 0.999, (1.0 - q) / (1.0 + q))
    mean_limit = 2.0 * (1.0 + momentum) / ((1.0 + 2.0 * momentum) * spectrum.largest)
    noise_limit = math.inf
    if spread > 0:
        noise_limit = 2.0 * (1.0 - momentum) / (spread * height)
    return StepRule(fraction * min(mean_limit, noise_limit), momentum)
