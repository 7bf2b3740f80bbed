"""The stochastic gradient of primal SGD: a block of rows and random features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sgdgp.core.checks import check_finite, check_same
from sgdgp.features import FeatureMap, NoRandomFeatures, random_features
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.solvers.system import System

_STORED_FEATURES = 1024


def regulariser_targets(system: System, noise_draws: Tensor | None) -> Tensor:
    """The noise draws in the system's scale (n, k); zero without any.

    Raises:
        ValueError: The shape, dtype or values do not fit.
    """
    if noise_draws is None:
        return torch.zeros_like(system.rhs)
    if noise_draws.shape != system.rhs.shape:
        raise ValueError(
            f"noise_draws: expected shape {tuple(system.rhs.shape)}, found "
            f"{tuple(noise_draws.shape)}"
        )
    check_same("noise_draws", noise_draws, "rhs", system.rhs)
    check_finite("noise_draws", noise_draws)
    return noise_draws / system.scale


class FeatureSource:
    """Fresh random features of the operator's kernel, or none."""

    def __init__(
        self, operator: KernelOperator, num_features: int, generator: torch.Generator
    ) -> None:
        self._operator = operator
        self._count = num_features
        self._generator = generator
        self._map: FeatureMap | None = None
        self.settings: dict[str, Any] = {"regulariser": "block", "num_features": 0}
        if num_features == 0:
            return
        if operator.outputs_per_input != 1:
            self.settings["regulariser"] = "block (several outputs per input)"
            return
        try:
            self._map = self._drawn()
        except NoRandomFeatures as error:
            self.settings["regulariser"] = (
                f"block ({error.kernel_name} has no random features)"
            )
            return
        self.settings = {
            "regulariser": "features",
            "num_features": self._map.num_features,
        }

    @property
    def active(self) -> bool:
        """Whether there are features."""
        return self._map is not None

    def noise_level(self, n: int) -> float:
        """Their part, n / M, of the gradient noise, per unit of the diagonal."""
        if self._map is None or self._map.exact:
            return 0.0
        return n / self._count

    def product(self, v: Tensor) -> Tensor:
        """Phi Phi^T v (n, k) with features drawn anew."""
        assert self._map is not None
        phi, self._map = self._map, None
        x = self._operator.x
        if phi.num_features <= _STORED_FEATURES:
            entries = phi.features(x)
            product = entries @ (entries.mT @ v)
        else:
            product = phi.forward(x, phi.adjoint(x, v))
        self._map = phi if phi.exact else self._drawn()
        return product

    def _drawn(self) -> FeatureMap:
        x = self._operator.x
        return random_features(
            self._operator.kernel,
            dim=x.shape[1],
            num_features=self._count,
            generator=self._generator,
            dtype=x.dtype,
            device=x.device,
        )


class GradientEstimator:
    """The stochastic gradient on a block, and the residual there for nothing.

    Args:
        system: The system.
        draws: T_r (n, k) with features; None estimates the regulariser from blocks.
        features: Source of the features.
        num_blocks: Blocks that a pass consists of, n / b.
    """

    def __init__(
        self,
        system: System,
        draws: Tensor | None,
        features: FeatureSource,
        num_blocks: int,
    ) -> None:
        self._system = system
        self._shift = None if draws is None else draws / system.noise
        self._features = features
        self._num_blocks = num_blocks

    def __call__(self, block: RowIndex, at: Tensor) -> tuple[Tensor, Tensor]:
        """(g (n, k), residual on the block (b, k)) at a point (n, k)."""
        system = self._system
        noise, here = system.noise[block], at[block]
        rows = system.operator.rows(block).to_dense()
        residual = system.rhs[block] - rows @ at - noise * here
        error = -residual / noise
        if self._shift is None:
            return (rows.mT @ error).mul_(self._num_blocks), residual
        # K e - t_e = -(residual) - Sigma (e - Sigma^-1 t_r)
        error -= here - self._shift[block]
        gradient = (rows.mT @ error).mul_(self._num_blocks)
        return gradient.add_(self._features.product(at - self._shift)), residual
