"""Sample functions of several outputs, evaluated together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.gpytorch_adapter import PairPrior, pairs_of
from sgdgp.posterior.cross import cross_product
from sgdgp.posterior.functions import (
    ConditionedPaths,
    Points,
    check_numbers,
    check_own_points,
)
from sgdgp.solvers.base import Solution

_ROWS = 4096
"""Points evaluated at a time."""


class OutputPaths(ABC):
    """Means and deviations of T outputs, in the units of the targets."""

    num_outputs: int

    @property
    @abstractmethod
    def num_functions(self) -> int:
        """Number of sample functions s."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Columns of the user's inputs."""

    @abstractmethod
    def subset(self, index: Sequence[int]) -> OutputPaths:
        """The functions with these numbers, in this order."""

    @abstractmethod
    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        """Values of function i at its own points x[i], in the units of the targets."""

    @abstractmethod
    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs (..., n, d); flat (N, d) and the shape in front of d.

        Raises:
            TypeError: Not a tensor.
            ValueError: Shape, dtype, device or values do not fit.
        """

    @abstractmethod
    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t s"]]:
        """Posterior means (n, T), and zero-mean sample values (n, T, s) if asked."""


@dataclass(frozen=True, eq=False)
class PairPaths(OutputPaths):
    """Outputs of a multitask model: one function of pairs of input and task.

    Attributes:
        paths: Functions of pairs [x, t] (N, d + 1).
    """

    paths: ConditionedPaths = field(repr=False)

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """Number of tasks."""
        return self.paths.prior.num_outputs

    @property
    def num_functions(self) -> int:
        """Number of sample functions."""
        return self.paths.weights.shape[1] - 1

    @property
    def dim(self) -> int:
        """Columns of the inputs, which are pairs without their task."""
        return self.paths.dim - 1

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs of the model, which are pairs without their task."""
        return replace(self.paths, dim=self.dim).flattened(x)

    def subset(self, index: Sequence[int]) -> PairPaths:
        """The functions of these numbers."""
        return PairPaths(self.paths.subset(index))

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        """All tasks at each function's own points."""
        tasks = self.num_outputs
        pairs = pairs_of(x.flatten(0, 1), tasks)
        own = pairs.reshape(x.shape[0], x.shape[1] * tasks, pairs.shape[1])
        shift, factor = self._units(x)
        return shift + factor * self.paths.each(own).reshape(*x.shape[:2], tasks)

    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t s"]]:
        """All tasks at each input, every task in its own units."""
        tasks = self.num_outputs
        mean, values = self.paths.mean_and_deviations(
            pairs_of(x, tasks), None if deviations else 0
        )
        shift, factor = self._units(x)
        values = values.reshape(len(x), tasks, values.shape[1])
        return (
            shift + factor * mean.reshape(len(x), tasks),
            factor.unsqueeze(1) * values,
        )

    def _units(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and factor (T,) of every task's targets."""
        prior = self.paths.prior
        assert isinstance(prior, PairPrior)
        return (
            like.new_tensor([scale.shift for scale in prior.target_scales]),
            like.new_tensor([scale.scale for scale in prior.target_scales]),
        )


@dataclass(frozen=True, eq=False)
class ParallelPaths(OutputPaths):
    """Independent outputs; those over the same rows read the kernel only once.

    Attributes:
        paths: The functions of each output.
    """

    paths: tuple[ConditionedPaths, ...] = field(repr=False)

    @property
    def num_outputs(self) -> int:  # type: ignore[override]
        """Number of outputs."""
        return len(self.paths)

    @property
    def num_functions(self) -> int:
        """Number of sample functions, of each output."""
        return self.paths[0].weights.shape[1] - 1

    @property
    def dim(self) -> int:
        """Columns of the inputs."""
        return self.paths[0].dim

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs of the model."""
        return self.paths[0].flattened(x)

    def subset(self, index: Sequence[int]) -> ParallelPaths:
        """The functions of these numbers, of every output."""
        return ParallelPaths(tuple(path.subset(index) for path in self.paths))

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        """Output by output at each function's own points."""
        scale = self.paths[0].prior.target_scale
        values = torch.stack([path.each(x) for path in self.paths], dim=-1)
        return scale.shift + scale.scale * values

    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t s"]]:
        """Output by output, in groups that share an operator."""
        means, values = [], []
        for rows in list(slices(x.shape[0], _ROWS)) or [slice(0, 0)]:
            mean, value = self._evaluate(x[rows], deviations)
            means.append(mean)
            values.append(value)
        return torch.cat(means), torch.cat(values)

    def _evaluate(self, x: Tensor, deviations: bool) -> tuple[Tensor, Tensor]:
        prior = self.paths[0].prior
        prior_mean, inputs = prior.evaluate(x)
        updates = self._updates(inputs, deviations)
        scale = prior.target_scale
        means = [prior_mean + update[:, 0] for update in updates]
        values = [
            path.draws(inputs) - update[:, 1:] if deviations else update[:, 1:]
            for path, update in zip(self.paths, updates, strict=True)
        ]
        return (
            scale.shift + scale.scale * torch.stack(means, dim=1),
            scale.scale * torch.stack(values, dim=1),
        )

    def _updates(self, inputs: Tensor, deviations: bool) -> list[Tensor]:
        """K(x, X) [v_y | v_s] of each output."""
        width = None if deviations else 1
        together: dict[int, list[int]] = {}
        for output, path in enumerate(self.paths):
            together.setdefault(id(path.operator), []).append(output)
        found: dict[int, Tensor] = {}
        for outputs in together.values():
            weights = [self.paths[output].weights[:, :width] for output in outputs]
            operator = self.paths[outputs[0]].operator
            product = cross_product(operator, inputs, torch.cat(weights, dim=1))
            parts = product.split([weight.shape[1] for weight in weights], dim=1)
            found.update(zip(outputs, parts, strict=True))
        return [found[output] for output in range(len(self.paths))]


@dataclass(frozen=True, eq=False)
class OutputFunctions:
    """Posterior functions of T outputs: x (n', d) -> (s, n', T), differentiable in x.

    Attributes:
        paths: Prior draws and representer weights.
        solution: The solve that conditioned these functions.
    """

    paths: OutputPaths = field(repr=False)
    solution: Solution

    def __call__(self, x: Points) -> Float[Tensor, "s *b n t"]:
        """Function values at x, in the units of the targets.

        Args:
            x: Inputs (n', d), or with leading batch dimensions (..., n', d).

        Returns:
            Values (s, n', T) or (s, ..., n', T).

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.paths.flattened(x)
        mean, deviations = self.paths.evaluate(flat, deviations=True)
        values = (mean.unsqueeze(-1) + deviations).permute(2, 0, 1)
        return values.reshape(values.shape[0], *shape, values.shape[2])

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        """Every function at points of its own: entry (i, j) is f_i(x[i, j]).

        Args:
            x: Points (s, q, d), one set for each function.

        Returns:
            Values (s, q, T), in the units of the targets, differentiable in x.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        check_own_points(x, self.num_functions, self.paths.dim)
        flat, _ = self.paths.flattened(x)
        return self.paths.each(flat.reshape(x.shape))

    def subset(self, index: Sequence[int]) -> OutputFunctions:
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
        return self.paths.num_functions
