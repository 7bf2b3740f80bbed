"""Posterior functions by pathwise conditioning, of one output or of several.

    f_s(x) = m(x) + phi(x) w_s + K(x, X) (v_y - v_s)

with v_y = H^-1 (y - m(X)), v_s = H^-1 (phi(X) w_s + eps_s), H = K + Sigma
(Wilson et al., ICML 2020, arXiv:2002.09309; Lin et al., NeurIPS 2023).

Several outputs are of two kinds. A *multitask* model is a model of one output over
pairs of input and task, so its functions are functions of pairs (``PairPaths``).
*Independent* outputs share kernel and noise, and are functions side by side
(``ParallelPaths``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator, RootLinearOperator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sgdgp.core.checks import check_finite, check_same
from sgdgp.core.slices import slices, tracks_gradient
from sgdgp.features import ExactDraws, PriorDraws, SelectedDraws
from sgdgp.gpytorch_adapter import MultitaskPrior, OutcomeScale, Prior
from sgdgp.operators import FeatureOperator, KernelOperator
from sgdgp.operators.evaluation import differentiable_block
from sgdgp.posterior.own_points import own_products
from sgdgp.solvers.base import Solution

Points: TypeAlias = (
    Float[Tensor, "*b n d"] | Float[Tensor, " n"] | tuple[Tensor, ...] | list[Tensor]
)
"""Inputs (..., n, d), (n,) where d is one, or all inputs of a model of several."""

_ROWS = 4096
"""Points evaluated at a time: with some dozens of functions, a few megabytes."""

_ENTRIES = 2**21
"""Kernel entries whose graph is held at once: 16 MB in float64."""


class Paths(ABC):
    """A mean and s functions around it, of one output or of T.

    Values are (n,) where ``num_outputs`` is None, and (n, T) else; both are written
    (n, *t). ``units`` is what they have to pass through to be targets.
    """

    dim: int
    """Columns of the user's inputs."""

    @property
    @abstractmethod
    def num_outputs(self) -> int | None:
        """Number of outputs T; None for values without an axis of outputs."""

    @property
    @abstractmethod
    def num_functions(self) -> int:
        """Number of sample functions s, of each output."""

    @property
    def units(self) -> OutcomeScale:
        """From values to the units of the targets. Default: they are in these."""
        return OutcomeScale()

    @abstractmethod
    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs (..., n, d); flat (N, d) and the shape in front of d.

        Raises:
            TypeError: Not a tensor.
            ValueError: Shape, dtype, device or values do not fit.
        """

    @abstractmethod
    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool = True
    ) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ... s"]]:
        """Posterior means (n, *t), and zero-mean sample values (n, *t, s) if wanted."""

    @abstractmethod
    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q ..."]:
        """Values of function i at its own points x[i]."""

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Paths:
        """The functions with these numbers, in this order, around the same mean."""

    @abstractmethod
    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n ..."]:
        """The likelihood's noise variances, in the units of the targets squared."""

    @abstractmethod
    def joint(
        self,
        mean: Float[Tensor, "n ..."],
        deviations: Float[Tensor, "n ... s"],
        noise: Float[Tensor, "n ..."] | None,
    ) -> MultivariateNormal:
        """A normal with this mean and the covariance of the deviations plus noise.

        Args:
            mean: In the units of the targets.
            deviations: As ``evaluate`` returns them.
            noise: In the units of the targets squared.
        """


@dataclass(frozen=True, eq=False)
class ConditionedPaths(Paths):
    """One output: prior draws and their corrections, evaluated together.

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

    @property
    def num_outputs(self) -> None:
        return None

    @property
    def num_functions(self) -> int:
        return self.weights.shape[1] - 1

    @property
    def units(self) -> OutcomeScale:
        return self.prior.outcome_scale

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
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

    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (n,) and zero-mean sample values (n, s), model's units."""
        columns = slice(0, None if deviations else 1)
        means, values = [], []
        for points in x.split(_ROWS):
            prior_mean, inputs = self.prior.evaluate(points)
            update = cross_product(self.operator, inputs, self.weights[:, columns])
            means.append(prior_mean + update[:, 0])
            value = update[:, 1:]
            values.append(self.draws(inputs) - value if deviations else value)
        return torch.cat(means), torch.cat(values)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        prior_mean, inputs = self.prior.evaluate(x.reshape(-1, x.shape[-1]))
        own = inputs.reshape(*x.shape[:2], inputs.shape[-1])
        weights = self.weights[:, :1] - self.weights[:, 1:]
        update = own_products(self.operator, own, weights)
        return prior_mean.reshape(x.shape[:2]) + self.draws.each(own) + update

    def subset(self, index: Sequence[int]) -> ConditionedPaths:
        columns = [0, *(1 + number for number in index)]
        # Stored column by column, as functions at points of their own read them.
        weights = self.weights.mT[columns].mT
        return replace(self, draws=self.draws.subset(index), weights=weights)

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return self.units.scale**2 * self.prior.noise(x)

    def joint(
        self, mean: Tensor, deviations: Tensor, noise: Tensor | None
    ) -> MultivariateNormal:
        root = (self.units.scale / deviations.shape[-1] ** 0.5) * deviations
        return MultivariateNormal(mean, _covariance(root, noise))


@dataclass(frozen=True, eq=False)
class PairPaths(Paths):
    """Outputs of a multitask model: one function of pairs of input and task.

    Attributes:
        paths: Functions of pairs [x, t] (N, d + 1).
    """

    paths: ConditionedPaths = field(repr=False)

    @property
    def prior(self) -> MultitaskPrior:
        """The prior over pairs."""
        assert isinstance(self.paths.prior, MultitaskPrior)
        return self.paths.prior

    @property
    def num_outputs(self) -> int:
        return self.prior.num_outputs

    @property
    def num_functions(self) -> int:
        return self.paths.num_functions

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Columns of the inputs, which are pairs without their task."""
        return self.paths.dim - 1

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        """Check inputs of the model, which are pairs without their task."""
        return replace(self.paths, dim=self.dim).flattened(x)

    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool = True
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t s"]]:
        """All tasks at each input, every task in its own units."""
        tasks = self.num_outputs
        mean, values = self.paths.evaluate(self.prior.rows(x), deviations=deviations)
        shift, factor = self._scales(x)
        values = values.reshape(len(x), tasks, values.shape[1])
        mean = shift + factor * mean.reshape(len(x), tasks)
        return mean, factor.unsqueeze(1) * values

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        tasks = self.num_outputs
        pairs = self.prior.rows(x.flatten(0, 1))
        own = pairs.reshape(x.shape[0], x.shape[1] * tasks, pairs.shape[1])
        shift, factor = self._scales(x)
        return shift + factor * self.paths.each(own).reshape(*x.shape[:2], tasks)

    def subset(self, index: Sequence[int]) -> PairPaths:
        return PairPaths(self.paths.subset(index))

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
        _, factor = self._scales(x)
        noise = self.prior.noise(self.prior.rows(x))
        return factor.square() * noise.reshape(len(x), -1)

    def joint(
        self, mean: Tensor, deviations: Tensor, noise: Tensor | None
    ) -> MultitaskMultivariateNormal:
        root = (deviations / deviations.shape[-1] ** 0.5).flatten(0, 1)
        if noise is not None:
            noise = noise.flatten()
        return MultitaskMultivariateNormal(mean, _covariance(root, noise))

    def _scales(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Shift and factor (T,) of every task's targets."""
        scales = self.prior.outcome_scales
        return (
            like.new_tensor([scale.shift for scale in scales]),
            like.new_tensor([scale.scale for scale in scales]),
        )


@dataclass(frozen=True, eq=False)
class ParallelPaths(Paths):
    """Independent outputs; those with the same operator read the kernel only once.

    Attributes:
        paths: The functions of each output.
    """

    paths: tuple[ConditionedPaths, ...] = field(repr=False)

    @property
    def num_outputs(self) -> int:
        return len(self.paths)

    @property
    def num_functions(self) -> int:
        return self.paths[0].num_functions

    @property
    def dim(self) -> int:  # type: ignore[override]
        """Columns of the user's inputs."""
        return self.paths[0].dim

    def flattened(self, x: Points) -> tuple[Tensor, torch.Size]:
        return self.paths[0].flattened(x)

    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool = True
    ) -> tuple[Float[Tensor, "n t"], Float[Tensor, "n t s"]]:
        """Output by output, in groups that share an operator."""
        parts = [self._evaluate(points, deviations) for points in x.split(_ROWS)]
        means, values = zip(*parts, strict=True)
        return torch.cat(means), torch.cat(values)

    def _evaluate(self, x: Tensor, deviations: bool) -> tuple[Tensor, Tensor]:
        first = self.paths[0]
        prior_mean, inputs = first.prior.evaluate(x)
        updates = self._updates(inputs, deviations)
        scale = first.units
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
        outputs_of: dict[KernelOperator, list[int]] = {}
        for output, path in enumerate(self.paths):
            outputs_of.setdefault(path.operator, []).append(output)
        updates: dict[int, Tensor] = {}
        for operator, outputs in outputs_of.items():
            weights = [self.paths[output].weights[:, :width] for output in outputs]
            product = cross_product(operator, inputs, torch.cat(weights, dim=1))
            parts = product.split([weight.shape[1] for weight in weights], dim=1)
            updates.update(zip(outputs, parts, strict=True))
        return [updates[output] for output in range(len(self.paths))]

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        scale = self.paths[0].units
        values = torch.stack([path.each(x) for path in self.paths], dim=-1)
        return scale.shift + scale.scale * values

    def subset(self, index: Sequence[int]) -> ParallelPaths:
        return ParallelPaths(tuple(path.subset(index) for path in self.paths))

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
        """See ``Paths``; the same for all outputs."""
        return self.paths[0].noise(x).unsqueeze(1).expand(-1, self.num_outputs)

    def joint(
        self, mean: Tensor, deviations: Tensor, noise: Tensor | None
    ) -> MultitaskMultivariateNormal:
        """Outputs are independent: their samples say nothing about each other."""
        root = (deviations / deviations.shape[-1] ** 0.5).transpose(0, 1).contiguous()
        if noise is not None:
            noise = noise.mT.contiguous()
        return MultitaskMultivariateNormal.from_batch_mvn(
            MultivariateNormal(mean.mT.contiguous(), _covariance(root, noise))
        )


def paths_of(paths: Sequence[ConditionedPaths]) -> Paths:
    """The functions of one output, of pairs as outputs, or of outputs side by side."""
    first, *others = paths
    if isinstance(first.prior, MultitaskPrior):
        return PairPaths(first)
    return ParallelPaths((first, *others)) if others else first


@dataclass(frozen=True, eq=False)
class SampleFunctions:
    """A set of s posterior functions, differentiable in x.

    Of one output x (n', d) -> (s, n'), of several x (n', d) -> (s, n', T).

    Attributes:
        paths: Prior draws and representer weights.
        solution: The solve that conditioned these functions.
    """

    paths: Paths = field(repr=False)
    solution: Solution

    def __call__(self, x: Points) -> Float[Tensor, "s ..."]:
        """Function values at x, in the units of the targets.

        Args:
            x: Inputs (n', d), or with leading batch dimensions (..., n', d).

        Returns:
            Values (s, n'), or (s, ..., n'); of T outputs with an axis of these last.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.paths.flattened(x)
        mean, deviations = self.paths.evaluate(flat)
        units = self.paths.units
        values = units.shift + units.scale * (mean.unsqueeze(-1) + deviations)
        values = values.movedim(-1, 0)
        return values.reshape(len(values), *shape, *values.shape[2:])

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q ..."]:
        """Every function at points of its own: entry (i, j) is f_i(x[i, j]).

        Costs s q kernel rows with one column each, where ``self(x)`` would take s
        columns for all of them.

        Args:
            x: Points (s, q, d), one set for each function.

        Returns:
            Values (s, q), of T outputs (s, q, T), in the units of the targets,
            differentiable in x.

        Raises:
            TypeError: x is not a tensor.
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        count, dim = self.num_functions, self.paths.dim
        if not torch.is_tensor(x):
            raise TypeError(f"x: expected a torch.Tensor, found {type(x)}")
        if x.ndim != 3 or x.shape[0] != count or x.shape[2] != dim:
            raise ValueError(
                f"x: expected shape ({count}, q, {dim}), points of each of {count} "
                f"functions, found {tuple(x.shape)}"
            )
        flat, _ = self.paths.flattened(x)
        units = self.paths.units
        return units.shift + units.scale * self.paths.each(flat.reshape(x.shape))

    def subset(self, index: Sequence[int]) -> SampleFunctions:
        """Some of the functions, by their numbers, in this order.

        Args:
            index: Numbers from 0 to s - 1.

        Raises:
            IndexError: There is no such function.
        """
        count = self.num_functions
        wrong = [number for number in index if not 0 <= number < count]
        if wrong:
            raise IndexError(
                f"index: expected numbers from 0 to {count - 1}, found {wrong[0]}"
            )
        return replace(self, paths=self.paths.subset(index))

    @property
    def num_functions(self) -> int:
        """Number of functions s."""
        return self.paths.num_functions


def cross_product(
    operator: KernelOperator,
    x_new: Float[Tensor, "m d"],
    v: Float[Tensor, "n k"],
) -> Float[Tensor, "m k"]:
    """K(X_new, X) v in bounded memory, differentiable in X_new.

    Without a graph the operator streams its own tiles. With one, GPyTorch evaluates
    the kernel block by block, and blocks are evaluated again in the backward pass,
    so the memory never holds more than a few blocks. Exact features need no block.
    """
    if not tracks_gradient(x_new):
        return operator.cross(x_new).matmul(v)
    source = operator.streaming()
    if isinstance(source, FeatureOperator):
        return source.product_at(x_new, v)
    columns = max(1, _ENTRIES // max(1, x_new.shape[0]))

    def product(x: Tensor, points: Tensor, weights: Tensor) -> Tensor:
        return differentiable_block(operator.kernel, x, points) @ weights

    pieces = list(slices(operator.x.shape[0], columns))
    if len(pieces) == 1:
        return product(x_new, operator.x, v)
    total = x_new.new_zeros(x_new.shape[0], v.shape[1])
    for rows in pieces:
        total = total + checkpoint(
            product, x_new, operator.x[rows], v[rows], use_reentrant=False
        )
    return total


def _covariance(root: Tensor, noise: Tensor | None) -> object:
    """Root root^T plus the noise on the diagonal, unevaluated."""
    covariance = RootLinearOperator(root)
    return covariance if noise is None else covariance + DiagLinearOperator(noise)
