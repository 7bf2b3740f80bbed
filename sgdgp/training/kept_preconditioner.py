"""A preconditioner that outlives the system it was made for.

From one step of an optimiser to the next the matrix changes little, so the last
approximate inverse still serves: a few more iterations against a setup that takes
longer than they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.solvers.preconditioners import Inverse, Preconditioner
from sgdgp.solvers.system import System


@dataclass(frozen=True)
class Reused(Inverse):
    """An inverse that cost nothing, because it was there already."""

    inverse: Inverse

    passes = 0.0

    @property
    def settings(self) -> Mapping[str, Any]:  # type: ignore[override]
        """Those of the inverse."""
        return {**self.inverse.settings, "reused": True}

    def __call__(self, r: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """P^-1 r, with the P of an earlier system."""
        return self.inverse(r)


@dataclass
class KeptPreconditioner(Preconditioner):
    """A recipe whose result is used for several systems of the same rows.

    Attributes:
        recipe: What it is made by.
        uses: For how many systems.
    """

    recipe: Preconditioner
    uses: int
    _inverse: Inverse | None = field(default=None, repr=False)
    _rows: int = field(default=0, repr=False)
    _left: int = field(default=0, repr=False)

    def cost(self, n: int) -> float:
        """See ``Preconditioner.cost``."""
        return 0.0 if self._is_fit(n) else self.recipe.cost(n)

    def prepare(self, system: System, generator: torch.Generator) -> Inverse:
        """See ``Preconditioner.prepare``."""
        if self._inverse is not None and self._is_fit(system.n):
            self._left -= 1
            return Reused(self._inverse)
        self._inverse = self.recipe.prepare(system, generator)
        self._rows, self._left = system.n, self.uses - 1
        return self._inverse

    def _is_fit(self, n: int) -> bool:
        return self._left > 0 and self._rows == n
