"""Expectation maximisation of a linear model's prior precisions, by samples.

For features with prior N(0, 1 / alpha_l) on the weights of group l, the evidence has a
stationary point where alpha_l |w_l|^2 = gamma_l: w is the posterior mean, and

    gamma_l = sum_i in l  (1 - alpha_l Sigma_ii) = E[v_l^T (phi^T phi v)_l]

is how many of the group's weights the data determine (MacKay, Neural Computation 4,
1992, eq. 20). The expectation is over posterior samples v in whitened weights; taken
over the outputs phi v like this, a few samples are enough whatever the number of
weights (Antoran et al., ICLR 2023, eq. 16), while D - |v|^2 would need thousands.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class

_LARGEST_RISE = math.log(100.0)
_LARGEST_FALL = math.log(30.0)
"""Of a log precision in one step: see ``PrecisionUpdate`` for why they differ."""

_NEAR = 0.7
"""A step in log alpha, a factor of two, below which its secant is believed."""

_LONGEST_NEAR, _LONGEST_FAR, _SHORTEST = 4.0, 1.25, 0.25
"""A move over the step that the map asks for: near its fixed point, far off, and at
least, where a secant over noisy steps would stop it."""

_SETTLED = 0.03
"""Change of a log precision that ends learning: well below what a few samples know of
gamma."""

_NEGLIGIBLE = 1e-3
"""Share of gamma below which a group is switched off."""

SMALLEST_DIMENSION = 1e-3
"""gamma of a group is at least this much of a weight: it is divided by, and logged."""


@dataclass(frozen=True)
class EffectiveDimension:
    """How many weights the data determine.

    Attributes:
        groups: gamma of each group (G,).
        standard_error: Of their sum, from the scatter over the samples.
    """

    groups: Float[Tensor, " G"]
    standard_error: float

    @property
    def total(self) -> float:
        """Gamma of all groups together."""
        return float(self.groups.sum())


def effective_dimension(
    products: Float[Tensor, "G k"], sizes: Sequence[int]
) -> EffectiveDimension:
    """Gamma of every group from posterior samples.

    Args:
        products: v_l^T (phi^T phi v)_l of every group and sample (G, k).
        sizes: Weights in each group.

    Returns:
        Estimates within [1e-3, size of the group]: sampling may leave that range, for
        small groups mostly.
    """
    products = products.double()
    total = products.sum(0)
    error = float(total.std()) / len(total) ** 0.5 if len(total) > 1 else math.inf
    upper = products.new_tensor([float(size) for size in sizes])
    gamma = products.mean(1).clamp_min(SMALLEST_DIMENSION).minimum(upper)
    return EffectiveDimension(gamma, error)


@register_stored_class
@dataclass(frozen=True)
class EMStep:
    """One step of expectation maximisation.

    Attributes:
        precisions: alpha before the step, one for each group.
        effective_dimension: gamma, one for each group.
        standard_error: Of gamma's sum.
        noise: Noise variance before the step; None for other likelihoods.
        loss: Negative log-likelihood of the linear model, summed over the data.
        errors: Bounds on the relative errors of the samples; none where none are drawn.
        passes: Passes over the data so far.
        seconds: Wall time so far.
    """

    precisions: tuple[float, ...]
    effective_dimension: tuple[float, ...]
    standard_error: float
    noise: float | tuple[float, ...] | None
    loss: float
    errors: tuple[float, ...]
    passes: float
    seconds: float


@register_stored_class
@dataclass(eq=False)
class PrecisionUpdate:
    """The fixed point of alpha -> gamma / |w|^2, by secants in log alpha.

    The plain map creeps towards its fixed point or swings around it (mostly with
    scaled priors). With s the step in log alpha that it asks for, and m the move made
    last time, the slope of s is (s - s_last) / m, and the move that makes s zero is
    -s / slope: longer than s where the map creeps, shorter where it swings. Near the
    fixed point moves may be four times the map's own, far off hardly longer than it;
    downwards none is longer than a factor of 30: a precision that is too small makes
    the next systems ill-conditioned, one that is too large costs nothing.

    A group the data say next to nothing about has its fixed point at infinity, be it
    the only one. Its precision stops where it no longer matters.

    Attributes:
        steps: Last s (G,), from an earlier run.
        moves: Last m (G,), likewise.
    """

    steps: Tensor | None = None
    moves: Tensor | None = None

    def __call__(
        self,
        precisions: Float[Tensor, " G"],
        gamma: Float[Tensor, " G"],
        squares: Float[Tensor, " G"],
    ) -> Float[Tensor, " G"]:
        """The next precisions.

        Args:
            precisions: alpha (G,), at which gamma and the squares were found.
            gamma: Effective dimensions (G,).
            squares: |v_l|^2 of the whitened mean (G,), alpha_l |w_l|^2.
        """
        gamma, squares = gamma.double(), squares.double()
        steps = (gamma / squares.clamp_min(1e-30)).log()
        least = (_NEGLIGIBLE * gamma.sum()).clamp_min(SMALLEST_DIMENSION)
        switched_off = (gamma <= least) & (steps > 0)
        steps = torch.where(switched_off, torch.zeros_like(steps), steps)
        moves = steps
        if self.steps is not None and self.moves is not None:
            slope = (steps - self.steps) / self.moves
            ratio = torch.where(
                slope < 0, -1.0 / slope, torch.full_like(slope, _LONGEST_NEAR)
            )
            longest = torch.where(steps.abs() < _NEAR, _LONGEST_NEAR, _LONGEST_FAR)
            moves = steps * ratio.nan_to_num(1.0).clamp_min(_SHORTEST).minimum(longest)
        moves = moves.clamp(-_LARGEST_FALL, _LARGEST_RISE)
        self.steps, self.moves = steps, moves
        return precisions * moves.exp().to(precisions)

    @property
    def has_settled(self) -> bool:
        """Whether the last move changed no precision by more than 3 %."""
        return self.moves is not None and bool((self.moves.abs() < _SETTLED).all())
