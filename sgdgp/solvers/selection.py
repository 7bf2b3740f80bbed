"""Which block of equations alternating projections solves next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.solvers.blocks import in_random_order

Picker = Callable[[Tensor], slice]
"""Returns the next block for a residual (n, k)."""


class Selection(ABC):
    """Rule for which block of equations is solved next."""

    @abstractmethod
    def picker(self, blocks: list[slice], generator: torch.Generator) -> Picker:
        """The rule at work on a partition."""


@register_stored_class
@dataclass(frozen=True)
class Greedy(Selection):
    """The block with the largest residual norm, summed over the columns."""

    def picker(self, blocks: list[slice], generator: torch.Generator) -> Picker:
        """See ``Selection.picker``."""

        def pick(residual: Tensor) -> slice:
            return blocks[int(block_norms(residual, blocks).sum(1).argmax())]

        return pick


@register_stored_class
@dataclass(frozen=True)
class RandomOrder(Selection):
    """Every block once in a random order, then again in another."""

    def picker(self, blocks: list[slice], generator: torch.Generator) -> Picker:
        """See ``Selection.picker``."""

        def forever() -> Iterator[slice]:
            while True:
                yield from in_random_order(blocks, generator)

        endless = forever()
        return lambda residual: next(endless)


def block_norms(
    residual: Float[Tensor, "n k"], blocks: list[slice]
) -> Float[Tensor, "m k"]:
    """Norm of every column on every block of a partition."""
    size = blocks[0].stop
    whole = len(residual) // size
    squares = residual.square()
    sums = squares[: whole * size].unflatten(0, (whole, size)).sum(1)
    if whole * size < len(residual):
        sums = torch.cat([sums, squares[whole * size :].sum(0, keepdim=True)])
    return sums.sqrt()
