"""Priors with independent weights: one variance, one a group, or the g-prior's."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite
from sgdgp.core.codec import register_stored_class
from sgdgp.core.processes import current_processes
from sgdgp.networks.priors.base import (
    Grouping,
    PriorSettings,
    ProbedPrior,
    Probes,
    WeightPrior,
    check_grouping,
    grouped,
    median_of,
    own_levels,
)
from sgdgp.networks.priors.blocks import Block, MatrixRoot
from sgdgp.tangent import Tangent


@register_stored_class
@dataclass(eq=False, repr=False)
class DiagonalPrior(WeightPrior):
    """R = diag(scales) alpha^-1/2.

    Attributes:
        scales: Standard deviations at precision one (D,). Default: one each.
    """

    scales: Float[Tensor, " D"] | None = field(default=None, kw_only=True)

    def _set_precisions(self, precisions: Tensor) -> None:
        super()._set_precisions(precisions)
        # One product per application, whatever the groups.
        if self.scales is not None:
            self._factor = self.scales * self._factor

    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        return rows * self._factor

    def whiten(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        return (self._rows(w) / self._factor).mT

    def pieces(self) -> list[tuple[Block, float]]:
        return [(MatrixRoot.independent(self._factor.expand(self.num_weights)), 1.0)]

    def folded(self) -> DiagonalPrior:
        scales = self._factor.expand(self.num_weights).contiguous()
        return replace(self, precisions=torch.ones_like(self.precisions), scales=scales)


@dataclass(frozen=True)
class Isotropic(PriorSettings):
    """N(0, I / alpha): one variance for all weights."""

    def build(self, tangent: Tangent, probes: Probes) -> DiagonalPrior:
        """R = I."""
        return DiagonalPrior(*grouped(tangent, "all"))


@dataclass(frozen=True)
class Layerwise(PriorSettings):
    """N(0, I / alpha_l): a variance for each group of weights.

    Attributes:
        groups: "tensors": each parameter tensor is a group. "layers": the tensors of
            one layer share a precision, and so do all normalisation parameters; small
            groups of their own, such as biases, tend to be switched off by learning.
            Or a function from the name of a parameter to the label of its group.
    """

    groups: Grouping = "tensors"

    def __post_init__(self) -> None:
        check_grouping(self.groups)

    def build(self, tangent: Tangent, probes: Probes) -> DiagonalPrior:
        """R = I, in groups."""
        return DiagonalPrior(*grouped(tangent, self.groups))


@dataclass(frozen=True)
class GPrior(ProbedPrior):
    """N(0, diag(G)^-1 / alpha), G = sum_n J_n^T H_n J_n: scale-free.

    The diagonal is estimated from squares of probes; its relative standard error is
    about sqrt(2 / (probes x batches)), so few suffice where there are many batches.

    Attributes:
        probes: Probes per batch; fewer where they would fill more than 1 GiB.
        floor: Smallest diagonal entry, relative to the median of its parameter tensor.
            Relative to its own tensor, so that rescaling a tensor changes nothing. A
            tensor that does not act on the training data at all takes the median of
            the others. The default predicted better than 1e-3 in all small networks
            that we tried: directions that the training data hardly excite get less
            variance.
        layerwise: False: one precision. True: one for each parameter tensor; or any
            grouping of ``Layerwise``.
    """

    floor: float = 0.1

    def build(self, tangent: Tangent, probes: Probes) -> DiagonalPrior:
        """R = diag(G)^-1/2.

        Raises:
            ValueError: All probes are zero (the curvature of the loss vanishes), or
                some are not finite.
        """
        squares = torch.zeros(
            tangent.num_weights, dtype=tangent.dtype, device=tangent.device
        )
        count = self.affordable(tangent)
        for probe in probes(count):
            for row in probe.mT:
                squares.addcmul_(row, row, value=1 / count)
        current_processes().sum_(squares)
        check_finite("squares of the probes", squares)
        parts = [squares[s] for s in tangent.slices.values()]
        levels = own_levels([median_of(part) for part in parts], squares.dtype)
        for part, level in zip(parts, levels, strict=True):
            part.clamp_min_(self.floor * level)
        return DiagonalPrior(*grouped(tangent, self.grouping), scales=squares.rsqrt_())
