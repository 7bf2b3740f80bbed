"""Parameters of accelerated sketch-and-project (arXiv:2505.13723), from the noise."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sgdgp.solvers.system import System


@dataclass(frozen=True)
class Acceleration:
    """The paper's mu and nu, and what follows from them."""

    mu: float
    nu: float

    @property
    def q(self) -> float:
        """sqrt(mu / nu)."""
        return math.sqrt(self.mu / self.nu)

    def calmer(self) -> Acceleration:
        """Ten times less memory in the momentum's square."""
        return Acceleration(min(10.0 * self.mu, 1.0 / self.nu), self.nu)

    @property
    def gamma(self) -> float:
        """1 / sqrt(mu nu)."""
        return 1.0 / math.sqrt(self.mu * self.nu)


def default_mu(system: System, nu: float) -> float:
    """The noise over the diagonal of H, between 0.1 / nu and 1 / nu."""
    ratio = system.noise[:, 0] / (system.operator.diagonal() + system.noise[:, 0])
    return min(max(float(ratio.double().mean()), 0.1 / nu), 1.0 / nu)
