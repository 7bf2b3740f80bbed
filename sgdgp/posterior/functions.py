"""Posterior sample functions by pathwise conditioning.

    f_s(x) = m(x) + phi(x) w_s + K(x, X) (v_y - v_s)

with v_y = H^-1 (y - m(X)), v_s = H^-1 (phi(X) w_s + eps_s), H = K + Sigma
(Wilson et al., ICML 2020, arXiv:2002.09309; Lin et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.checks import check_finite, check_same
from sgdgp.gpytorch_adapter import Prior
from sgdgp.operators.base import KernelOperator, row_slices
from sgdgp.posterior.cross import cross_product
from sgdgp.solvers.base import Solution

Points: TypeAlias = (
    Float[Tensor, "*b n d"] | Float[Tensor, " n"] | tuple[Tensor, ...] | list[Tensor]
)
"""Inputs (..., n, d), (n,) where d is one, or all inputs of a model of several."""

_ROWS = 4096
"""Points evaluated at a time."""


@dataclass(frozen=True, eq=False)
class ConditionedPaths:
    """Prior draws and their corrections, evaluated together.

    Attributes:
        prior: Mean, kernel and units.
        operator: K over the training inputs.
        draws: Prior function draws, kernel inputs (n, p) -> (n, s).
        weights: Representer weights [v_y | v_1 ... v_s] (n, 1 + s).
        dim: Columns of the user's inputs.
    """

    prior: Prior
    operator: KernelOperator = field(repr=False)
    draws: Callable[[Tensor], Tensor] = field(repr=False)
    weights: Float[Tensor, "n k"] = field(repr=False)
    dim: int

    def mean_and_deviations(
        self, x: Float[Tensor, "n d"], num_deviations: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (n,) and zero-mean sample values (n, s), model's units."""
        wanted = slice(0, None if num_deviations is None else 1 + num_deviations)
        means, deviations = [], []
        # An empty x is one empty slice.
        for rows in list(row_slices(x.shape[0], _ROWS)) or [slice(0, 0)]:
            prior_mean, inputs = self.prior.evaluate(x[rows])
            update = cross_product(self.operator, inputs, self.weights[:, wanted])
            means.append(prior_mean + update[:, 0])
            if num_deviations == 0:
                deviations.append(update[:, 1:])
            else:
                deviations.append(self.draws(inputs) - update[:, 1:])
        return torch.cat(means), torch.cat(deviations)

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs (..., n, d); flat (N, d) and the shape in front of d.

        Raises:
            TypeError: Not a tensor.
            ValueError: Shape, dtype, device or values do not fit.
        """
        x = self.prior.joined(x)
        if not torch.is_tensor(x):
            raise TypeError(f"x: expected a torch.Tensor, found {type(x)}")
        if x.ndim == 1 and self.dim == 1:
            x = x.unsqueeze(-1)
        if x.ndim < 2 or x.shape[-1] != self.dim:
            raise ValueError(
                f"x: expected shape (n, {self.dim}), found {tuple(x.shape)}"
            )
        check_same("x", x, "the training inputs", self.operator.x)
        check_finite("x", x)
        return x.reshape(-1, self.dim), x.shape[:-1]


@dataclass(frozen=True, eq=False)
class SampleFunctions:
    """A set of s posterior functions: x (n', d) -> (s, n'), differentiable in x.

    Attributes:
        paths: Prior draws and representer weights.
        solution: The solve that conditioned these functions.
    """

    paths: ConditionedPaths = field(repr=False)
    solution: Solution

    def __call__(self, x: Points) -> Float[Tensor, "s *b n"]:
        """Function values at x, in the units of the targets.

        Args:
            x: Inputs (n', d), or with leading batch dimensions (..., n', d).

        Returns:
            Values (s, n') or (s, ..., n').

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.paths.flattened(x)
        mean, deviations = self.paths.mean_and_deviations(flat)
        units = self.paths.prior.target_scale
        values = units.shift + units.scale * (mean.unsqueeze(1) + deviations)
        return values.mT.reshape(values.shape[1], *shape)
