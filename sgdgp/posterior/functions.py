"""Posterior sample functions by pathwise conditioning.

    f_s(x) = m(x) + phi(x) w_s + K(x, X) (v_y - v_s)

with v_y = H^-1 (y - m(X)), v_s = H^-1 (phi(X) w_s + eps_s), H = K + Sigma
(Wilson et al., ICML 2020, arXiv:2002.09309; Lin et al., NeurIPS 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite, check_same
from sgdgp.core.slices import slices
from sgdgp.features import ExactDraws, PriorDraws, SelectedDraws
from sgdgp.gpytorch_adapter import Prior
from sgdgp.operators.base import KernelOperator
from sgdgp.posterior.cross import cross_product
from sgdgp.posterior.each import own_products
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
    draws: PriorDraws | ExactDraws | SelectedDraws = field(repr=False)
    weights: Float[Tensor, "n k"] = field(repr=False)
    dim: int

    def subset(self, index: Sequence[int]) -> ConditionedPaths:
        """The functions with these numbers, in this order, around the same mean."""
        columns = [0, *(1 + number for number in index)]
        # Stored column by column, as functions at points of their own read them.
        weights = self.weights.mT[columns].mT
        return replace(self, draws=self.draws.subset(index), weights=weights)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Values of function i at its own points x[i], in the model's units."""
        prior_mean, inputs = self.prior.evaluate(x.reshape(-1, x.shape[-1]))
        own = inputs.reshape(*x.shape[:2], inputs.shape[-1])
        weights = self.weights[:, :1] - self.weights[:, 1:]
        update = own_products(self.operator, own, weights)
        return prior_mean.reshape(x.shape[:2]) + self.draws.each(own) + update

    def mean_and_deviations(
        self, x: Float[Tensor, "n d"], num_deviations: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (n,) and zero-mean sample values (n, s), model's units."""
        wanted = slice(0, None if num_deviations is None else 1 + num_deviations)
        means, deviations = [], []
        # An empty x is one empty slice.
        for rows in list(slices(x.shape[0], _ROWS)) or [slice(0, 0)]:
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

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Every function at points of its own: entry (i, j) is f_i(x[i, j]).

        Costs s q kernel rows with one column each, where ``self(x)`` would take s
        columns for all of them.

        Args:
            x: Points (s, q, d), one set for each function.

        Returns:
            Values (s, q), in the units of the targets, differentiable in x.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        check_own_points(x, self.num_functions, self.paths.dim)
        flat, _ = self.paths.flattened(x)
        units = self.paths.prior.target_scale
        return units.shift + units.scale * self.paths.each(flat.reshape(x.shape))

    def subset(self, index: Sequence[int]) -> SampleFunctions:
        """Some of the functions, by their numbers, in this order.

        Args:
            index: Numbers from 0 to s - 1.

        Raises:
            IndexError: There is no such function.
        """
        check_numbers(index, self.num_functions)
        return replace(self, paths=self.paths.subset(index))

    @property
    def num_functions(self) -> int:
        """Number of functions s."""
        return self.paths.weights.shape[1] - 1


def check_own_points(x: Tensor, count: int, dim: int) -> None:
    """Refuse points that are not one set (q, d) for each function.

    Raises:
        TypeError: Not a tensor.
        ValueError: Not of shape (count, q, dim).
    """
    if not torch.is_tensor(x):
        raise TypeError(f"x: expected a torch.Tensor, found {type(x)}")
    if x.ndim != 3 or x.shape[0] != count or x.shape[2] != dim:
        raise ValueError(
            f"x: expected shape ({count}, q, {dim}), points of each of {count} "
            f"functions, found {tuple(x.shape)}"
        )


def check_numbers(index: Sequence[int], count: int) -> None:
    """Refuse numbers of functions that do not exist.

    Raises:
        IndexError: A number is outside 0 ... count - 1.
    """
    wrong = [number for number in index if not 0 <= number < count]
    if wrong:
        raise IndexError(
            f"index: expected numbers from 0 to {count - 1}, found {wrong[0]}"
        )
