"""Step size and momentum of stochastic dual descent from spectral estimates.

Everything refers to the matrix scaled to unit diagonal, D^-1/2 H D^-1/2 with
D = diag(H) and H = K + Sigma: for stationary kernels a constant, for others what
keeps a few large rows from setting the step of all. With look-ahead momentum rho
and m = n / b blocks, random-coordinate descent with step beta is stable when

    beta < 2 (1 + rho) / ((1 + 2 rho) lambda_1)      (mean dynamics)
    beta < 2 (1 - rho) / ((m - 1) tau)               (sampling noise)

and half the harmonic mean of the two is safe where both matter. With independent
blocks tau is the mean diagonal, 1. Blocks that are all visited once in a pass sample
the leading eigenvectors without noise, so only the rest counts:
tau = (1 / n) sum_i min(lambda_i, 0.2 m).

Long memory 1 / (1 - rho) pays late in a solve and costs early. Sweeps over step and
momentum on fourteen problems with lambda_1 / m from 1 to 32 agree on a memory, in
passes p, of 0.06 sqrt(p lambda_1 / ((m - 1) tau)), and few blocks want no less than
1.5 lambda_1 / (m - 1) steps; never beyond the (t + 3) / 3 steps of Nesterov's
schedule nor the optimum of deterministic acceleration, rho = (1 - q) / (1 + q) with
q = sqrt(lambda_n / lambda_1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sgdgp.operators.feature import FeatureOperator
from sgdgp.solvers.feature_spectrum import leading_eigenvalues, scale_diagonal
from sgdgp.solvers.system import System

_SUBSET = 1000
_WELL_SAMPLED = 0.2
_MEMORY = 0.06
_LEAST_MEMORY = 1.5
_MEAN_FRACTION = 0.8
_NOISE_FRACTION = 0.6
_LESS_WITH_NOISE = 0.35


@dataclass(frozen=True)
class Spectrum:
    """What the step rules need to know of H = K + Sigma scaled to unit diagonal.

    Attributes:
        leading: Estimates of the m leading eigenvalues, ascending (m,).
        rest: Mean of the other n - m.
        smallest: Lower bound of the smallest.
        diagonal: The diagonal of H itself (n, 1).
        passes: What the estimates cost.
    """

    leading: Tensor
    rest: float
    smallest: float
    diagonal: Tensor
    passes: float = 0.0

    @property
    def largest(self) -> float:
        """Estimate of the largest eigenvalue: at least the mean of all, 1."""
        return max(float(self.leading[-1]), 1.0)

    def tail(self, threshold: float) -> float:
        """Mean eigenvalue, with those above a threshold cut down to it."""
        others = len(self.diagonal) - len(self.leading)
        cut = float(self.leading.clamp_max(threshold).sum())
        return (cut + others * self.rest) / len(self.diagonal)


@dataclass(frozen=True)
class StepRule:
    """Step size and momentum for one block size."""

    step_size: float
    momentum: float


def estimate_spectrum(system: System, generator: torch.Generator) -> Spectrum:
    """Estimate the spectrum from a random subset of at most 1,000 points.

    The leading eigenvalues of K are close to n / m times those of K_mm; the others
    are taken to be zero, so that H has the noise there.
    """
    operator = system.operator
    if isinstance(operator, FeatureOperator):
        return _spectrum_from_features(system, operator, generator)
    n = system.n
    size = min(n, _SUBSET)
    subset = torch.randperm(n, generator=generator, device=generator.device)[:size]
    subset = subset.to(system.rhs.device)
    diagonal = system.operator.diagonal().unsqueeze(1) + system.noise
    scale = diagonal[subset].rsqrt()
    matrix = system.operator.block(subset, subset) * scale * scale.mT
    ratio = system.noise / diagonal
    leading = torch.linalg.eigvalsh(matrix).double().clamp_min(0.0) * (n / size)
    return Spectrum(
        leading=leading + float(ratio.max()),
        rest=float(ratio.double().mean()),
        smallest=float(ratio.min()),
        diagonal=diagonal,
        passes=size**2 / n**2,
    )


def _spectrum_from_features(
    system: System, operator: FeatureOperator, generator: torch.Generator
) -> Spectrum:
    """The same from as few features as possible."""
    prior, swept = scale_diagonal(operator, generator)
    diagonal = prior.unsqueeze(1) + system.noise
    leading, passes = leading_eigenvalues(operator, diagonal.rsqrt(), generator)
    ratio = system.noise / diagonal
    return Spectrum(
        leading=leading + float(ratio.max()),
        rest=float(ratio.double().mean()),
        smallest=float(ratio.min()),
        diagonal=diagonal,
        passes=swept + passes,
    )


def step_rule(
    spectrum: Spectrum,
    block_size: int,
    passes: float = math.inf,
    *,
    momentum: float | None = None,
    fraction: float | None = None,
) -> StepRule:
    """Momentum and step size for a block size, from the two stability limits.

    Args:
        spectrum: Spectral estimates of H.
        block_size: Coordinates per step.
        passes: Passes since the start, on which the momentum depends.
        momentum: Fixed momentum in [0, 1). Default: set from the spectrum.
        fraction: Part of the joint stability limit that is used. Default: 0.8 where
            the mean dynamics set it, 0.6 where sampling noise does, less where Sigma
            makes up much of H.
    """
    spread = len(spectrum.diagonal) / block_size - 1.0
    tail = spectrum.tail(max(8.0, _WELL_SAMPLED * (spread + 1.0)))
    if momentum is None:
        memory = (passes * (spread + 1.0) + 3.0) / 3.0
        if spread > 0:
            worth = math.sqrt(passes * spectrum.largest / (spread * tail))
            least = _LEAST_MEMORY * spectrum.largest / spread
            memory = min(memory, max(_MEMORY * (spread + 1.0) * worth, least))
        q = math.sqrt(min(1.0, spectrum.smallest / spectrum.largest))
        momentum = min(1.0 - 1.0 / max(1.0, memory), (1.0 - q) / (1.0 + q), 0.9999)
    mean = (1.0 + 2.0 * momentum) * spectrum.largest / (2.0 * (1.0 + momentum))
    noise = spread * tail / (2.0 * (1.0 - momentum))
    if fraction is not None:
        return StepRule(fraction / (mean + noise), momentum)
    # Equations that are all noise converge fastest at half of their limit.
    whole = 1.0 - _LESS_WITH_NOISE * spectrum.smallest
    step_size = whole / (mean / _MEAN_FRACTION + noise / _NOISE_FRACTION)
    return StepRule(step_size, momentum)
