"""A preconditioner that is prepared once and used in several solves."""

from __future__ import annotations

import torch
from torch import Tensor

from sgdgp.solvers.preconditioners import Inverse, Preconditioner
from sgdgp.solvers.system import System


class Once(Preconditioner):
    """A recipe that is carried out once; it depends on K and Sigma only."""

    def __init__(self, recipe: Preconditioner) -> None:
        self._recipe = recipe
        self._inverse: Inverse | None = None

    def __repr__(self) -> str:
        return repr(self._recipe)

    def cost(self, n: int) -> float:
        """The recipe's, the first time."""
        return self._recipe.cost(n) if self._inverse is None else 0.0

    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        """P^-1, prepared at the first call."""
        if self._inverse is None:
            self._inverse = self._recipe.prepare(system, generator)
            return self._inverse
        return _Again(self._inverse)


class _Again(Inverse):
    """An inverse that is already paid for."""

    passes = 0.0

    def __init__(self, inverse: Inverse) -> None:
        self._inverse = inverse
        self.settings = inverse.settings

    def __call__(self, r: Tensor) -> Tensor:
        """P^-1 r."""
        return self._inverse(r)
