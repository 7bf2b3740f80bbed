"""Where to look: uniform points, and points near observations with large values.

Lin et al. (NeurIPS 2023) draw observations in proportion to their values above the
smallest one and perturb them by N(0, (lengthscale / 2)^2), clipped to the box.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.bayesopt.functions import Functions
from sgdgp.core.slices import slices

_BLOCK = 4096
"""Candidates drawn at a time: what is drawn depends on neither memory nor device."""

_SMALLEST_SCORE = 1e-6


@dataclass(frozen=True, eq=False)
class Candidates:
    """A distribution of candidate points in a box.

    Attributes:
        bounds: Lower and upper corner (2, d).
        exploration: Share of uniform points.
        nearby: Standard deviations of perturbations (d,).
        x: Points to look near (n, d), or None: all candidates are uniform.
        cumulated: Their weights, summed up to each of them, in float64 (n,).
    """

    bounds: Float[Tensor, "2 d"]
    exploration: float
    nearby: Float[Tensor, " d"]
    x: Tensor | None = field(default=None, repr=False)
    cumulated: Tensor | None = field(default=None, repr=False)

    def draw(
        self, count: int, generator: torch.Generator
    ) -> Iterator[Float[Tensor, "b d"]]:
        """``count`` candidates, block by block, on the device of the bounds."""
        for rows in slices(count, _BLOCK):
            yield self._block(rows.stop - rows.start, generator)

    def _block(self, count: int, generator: torch.Generator) -> Tensor:
        lower, upper = self.bounds
        shape = (count, len(lower))

        def uniform(*size: int) -> Tensor:
            return torch.rand(
                size, generator=generator, device=generator.device, dtype=torch.float64
            ).to(lower.device)

        anywhere = lower + (upper - lower) * uniform(*shape).to(lower)
        if self.x is None or self.cumulated is None:
            return anywhere
        near = uniform(count) >= self.exploration
        mass = uniform(count) * self.cumulated[-1]
        index = torch.searchsorted(self.cumulated, mass, right=True)
        centre = self.x[index.clamp_max(len(self.x) - 1)]
        step = torch.randn(
            shape, generator=generator, device=generator.device, dtype=torch.float64
        ).to(lower)
        moved = torch.clamp(centre + self.nearby * step, lower, upper)
        return torch.where(near.unsqueeze(1), moved, anywhere)


def cumulated_scores(y: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Running sums of what each value is above the smallest one, and a little more.

    The published code adds the smallest value where it has to be taken away, and so
    draws with negative weights.
    """
    y = y.double()
    return (y - y.min() + _SMALLEST_SCORE).cumsum(0)


def best_candidates(
    functions: Functions,
    blocks: Iterator[Float[Tensor, "b d"]],
    count: int,
    rows: int,
) -> Float[Tensor, "s k d"]:
    """The ``count`` candidates where each function is largest, in no order.

    Args:
        functions: s functions; all see the same candidates.
        blocks: The candidates.
        count: How many to keep for each function.
        rows: Candidates to evaluate at a time.
    """
    values: Tensor | None = None
    points: Tensor | None = None
    for block in blocks:
        for part in block.split(rows):
            found, index = _largest(functions(part), count)
            where = part[index]
            if values is not None and points is not None:
                found, index = _largest(torch.cat([values, found], 1), count)
                where = picked(torch.cat([points, where], 1), index)
            values, points = found, where
    if points is None:
        raise ValueError("blocks: expected candidates, found none")
    return points


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest entries of each row, and their columns."""
    found, index = values.topk(min(count, values.shape[1]), 1)
    return found, index


def picked(
    points: Float[Tensor, "s q d"], index: Int[Tensor, "s k"]
) -> Float[Tensor, "s k d"]:
    """Some of each function's own points."""
    return points.gather(1, index.unsqueeze(-1).expand(-1, -1, points.shape[-1]))
