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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, TypeAlias

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator import LinearOperator
from linear_operator.operators import (
    DenseLinearOperator,
    DiagLinearOperator,
    RootLinearOperator,
)
from torch import Tensor

from sgdgp.core.checks import check_finite, check_not_mapped, check_same
from sgdgp.core.inference import outside_inference_mode
from sgdgp.features import ExactDraws, PriorDraws, SelectedDraws
from sgdgp.gpytorch_adapter import MultitaskPrior, OutcomeScale, Prior
from sgdgp.operators import KernelOperator
from sgdgp.posterior.own_points import own_products
from sgdgp.posterior.variances import (
    EXACT_ROWS,
    Variances,
    variance_of,
    variances_given,
)
from sgdgp.solvers.base import Factor, Solution
from sgdgp.solvers.system import rounding_of_products

Points: TypeAlias = (
    Float[Tensor, "*b n d"] | Float[Tensor, " n"] | tuple[Tensor, ...] | list[Tensor]
)
"""Inputs (..., n, d), (n,) where d is one, or all inputs of a model of several."""

_ROUNDED = 0.03
"""Deviations of the noise that rounding may move a mean by: more is evaluated anew."""

_ROWS = 4096
"""Points evaluated at a time: with some dozens of functions, a few megabytes."""


class Moments(NamedTuple):
    """Of the posterior at points on their own; each (n, *t).

    Attributes:
        mean: Posterior means.
        variance: Posterior variances.
        error: Standard errors of the variances; zero where they are exact.
    """

    mean: Tensor
    variance: Tensor
    error: Tensor


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
    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        """Means, variances and their standard errors, differentiable in x."""

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
    def covariances(self, x: Float[Tensor, "b q d"]) -> list[Tensor]:
        """Covariances of batches of points, of each output that is independent.

        Only where they are exact, see ``variances.are_exact``. In the units of the
        model: (b, q, q), or of correlated outputs (b, q T, q T).
        """

    @abstractmethod
    def joint(
        self, x: Float[Tensor, "n d"], noise: Float[Tensor, "n ..."] | None
    ) -> MultivariateNormal:
        """The posterior at x with all covariances, plus noise, in the targets' units.

        Where covariances are not known exactly (see ``Variances``), correlations are
        those of the functions, and variances those of ``moments``.

        Args:
            x: Points.
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
        training_noise: The diagonal of Sigma (n,).
        dim: Columns of the user's inputs.
        factor: Of K + Sigma, where there is one already.
    """

    prior: Prior
    operator: KernelOperator = field(repr=False)
    draws: PriorDraws | ExactDraws | SelectedDraws = field(repr=False)
    weights: Float[Tensor, "n k"] = field(repr=False)
    training_noise: Float[Tensor, " n"] = field(repr=False)
    dim: int
    factor: Factor | None = field(default=None, repr=False)

    @cached_property
    def variances(self) -> Variances:
        """What is known of variances beside the weights; costs a pass or a factor."""
        return variances_given(
            self.operator, self.training_noise, self.weights, self.factor
        )

    @cached_property
    def _wide(self) -> KernelOperator | None:
        """K in float64, where the data's dtype would round off what the mean says.

        Large weights of opposite signs cancel where the noise is small.
        """
        accepted = _ROUNDED * float(self.training_noise.mean().sqrt())
        weights, eps = self.weights[:, :1], torch.finfo(self.weights.dtype).eps
        if self.operator.has_features:
            return None
        # What products are rounded by at most, to be measured if it is too much.
        largest = eps * float(self.operator.diagonal().amax() * weights.abs().sum())
        with torch.no_grad():
            if largest <= accepted or (
                rounding_of_products(self.operator, weights) <= accepted
            ):
                return None
            return self.operator.streaming().to(torch.float64)

    def mean_update(
        self, inputs: Float[Tensor, "n p"], update: Float[Tensor, "n k"]
    ) -> Float[Tensor, " n"]:
        """K(x, X) v_y at kernel inputs, given products with all weights.

        Raises:
            ValueError: They are beyond the range of the data's dtype.
        """
        mean = update[:, 0]
        if self._wide is not None:
            weights = self.weights[:, :1].double()
            mean = self._wide.product_at(inputs.double(), weights)[:, 0].to(update)
        if not bool((torch.isfinite(update).all(1) & torch.isfinite(mean)).all()):
            raise ValueError(
                f"x: the kernel leaves the range of {update.dtype} at some points; "
                "give float64 data, or a smaller scale of inputs or kernel"
            )
        return mean

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
        check_not_mapped("x", x)
        check_finite("x", x)
        return x.reshape(-1, self.dim), x.shape[:-1]

    @outside_inference_mode
    def evaluate(
        self, x: Float[Tensor, "n d"], *, deviations: bool = True
    ) -> tuple[Tensor, Tensor]:
        """Posterior mean (n,) and zero-mean sample values (n, s), model's units."""
        columns = slice(0, None if deviations else 1)
        means, values = [], []
        for points in x.split(_ROWS):
            prior_mean, inputs = self.prior.evaluate(points)
            update = self.operator.product_at(inputs, self.weights[:, columns])
            means.append(prior_mean + self.mean_update(inputs, update))
            value = update[:, 1:]
            values.append(self.draws(inputs) - value if deviations else value)
        return torch.cat(means), torch.cat(values)

    @outside_inference_mode
    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        prior_mean, inputs = self.prior.evaluate(x)
        bound, products, rest = self.variances.explain(inputs)
        mean = prior_mean + self.mean_update(inputs, products)
        return Moments(mean, *self.variance(inputs, bound, products, rest))

    def variance(
        self, inputs: Tensor, bound: Tensor, products: Tensor, rest: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Variances and standard errors (n,), given what ``Explained`` has of them."""
        return variance_of(
            bound,
            None if rest is None else rest[:, 1:],
            lambda rows: self.draws(inputs[rows]) - products[rows, 1:],
            self.draws.covariance_error,
        )

    @outside_inference_mode
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

    def covariances(self, x: Float[Tensor, "b q d"]) -> list[Tensor]:
        return [_blocks(self.prior, self.variances, x)]

    def joint(self, x: Tensor, noise: Tensor | None) -> MultivariateNormal:
        units = self.units
        mean, _ = self.evaluate(x, deviations=False)
        covariance = self.covariance(x, x.new_tensor(units.scale))
        return MultivariateNormal(
            units.shift + units.scale * mean, _plus(covariance, noise)
        )

    @outside_inference_mode
    def covariance(
        self, x: Float[Tensor, "n d"], scale: Tensor, outputs: int = 1
    ) -> LinearOperator:
        """Covariances (n, n) of scale * f(x), unevaluated.

        Args:
            x: Points.
            scale: A number, or one for each point (n,).
            outputs: How many of these will be in memory at once.
        """
        if outputs * len(x) <= EXACT_ROWS:
            found = self.variances.covariance(self.prior.evaluate(x)[1])
            if found is not None:
                return DenseLinearOperator(scale.unsqueeze(-1) * found * scale)
        _, deviations = self.evaluate(x)
        _, variance, _ = self.moments(x)
        tiny = torch.finfo(x.dtype).tiny
        ratio = variance / deviations.square().sum(1).clamp_min(tiny)
        return RootLinearOperator((scale * ratio.sqrt()).unsqueeze(-1) * deviations)


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
        if torch._C._are_functorch_transforms_active():
            raise TypeError(
                "x: torch.func is not supported for the kernels of multitask models, "
                "which have autograd functions; use torch.autograd"
            )
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

    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        """All tasks at each input, every task in its own units."""
        moments = self.paths.moments(self.prior.rows(x))
        shape = len(x), self.num_outputs
        mean, variance, error = (part.reshape(shape) for part in moments)
        shift, factor = self._scales(x)
        square = factor.square()
        return Moments(shift + factor * mean, square * variance, square * error)

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

    def covariances(self, x: Float[Tensor, "b q d"]) -> list[Tensor]:
        rows = self.prior.rows(x.flatten(0, 1))
        tasks = self.num_outputs
        return self.paths.covariances(
            rows.reshape(len(x), x.shape[1] * tasks, rows.shape[1])
        )

    def joint(self, x: Tensor, noise: Tensor | None) -> MultitaskMultivariateNormal:
        mean, _ = self.evaluate(x, deviations=False)
        scale = self._scales(x)[1].repeat(len(x))
        covariance = self.paths.covariance(self.prior.rows(x), scale)
        if noise is not None:
            noise = noise.flatten()
        return MultitaskMultivariateNormal(mean, _plus(covariance, noise))

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

    @outside_inference_mode
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
        means = [
            prior_mean + path.mean_update(inputs, update)
            for path, update in zip(self.paths, updates, strict=True)
        ]
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
        updates: dict[int, Tensor] = {}
        for outputs in self._groups:
            weights = [self.paths[output].weights[:, :width] for output in outputs]
            operator = self.paths[outputs[0]].operator
            product = operator.product_at(inputs, torch.cat(weights, dim=1))
            updates.update(self._divided(outputs, product))
        return [updates[output] for output in range(len(self.paths))]

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Numbers of the outputs that share an operator."""
        groups: dict[KernelOperator, list[int]] = {}
        for output, path in enumerate(self.paths):
            groups.setdefault(path.operator, []).append(output)
        return list(groups.values())

    def _divided(
        self, outputs: Sequence[int], columns: Tensor
    ) -> Iterator[tuple[int, Tensor]]:
        """Each output with its own of columns that stand side by side."""
        return zip(outputs, columns.chunk(len(outputs), dim=1), strict=True)

    @cached_property
    def _variances(self) -> list[Variances]:
        """Of each group of outputs."""
        return [
            variances_given(
                self.paths[outputs[0]].operator,
                self.paths[outputs[0]].training_noise,
                torch.cat([self.paths[output].weights for output in outputs], dim=1),
                self.paths[outputs[0]].factor,
            )
            for outputs in self._groups
        ]

    @outside_inference_mode
    def moments(self, x: Float[Tensor, "n d"]) -> Moments:
        """Output by output, in groups that share an operator."""
        first = self.paths[0]
        prior_mean, inputs = first.prior.evaluate(x)
        found: dict[int, Moments] = {}
        for outputs, variances in zip(self._groups, self._variances, strict=True):
            bound, products, rest = variances.explain(inputs)
            own_rest = {} if rest is None else dict(self._divided(outputs, rest))
            for output, own in self._divided(outputs, products):
                found[output] = Moments(
                    prior_mean + self.paths[output].mean_update(inputs, own),
                    *self.paths[output].variance(
                        inputs, bound, own, own_rest.get(output)
                    ),
                )
        mean, variance, error = (
            torch.stack([found[output][i] for output in range(len(self.paths))], 1)
            for i in range(3)
        )
        shift, scale = first.units.shift, first.units.scale
        return Moments(shift + scale * mean, scale**2 * variance, scale**2 * error)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q t"]:
        scale = self.paths[0].units
        values = torch.stack([path.each(x) for path in self.paths], dim=-1)
        return scale.shift + scale.scale * values

    def subset(self, index: Sequence[int]) -> ParallelPaths:
        return ParallelPaths(tuple(path.subset(index) for path in self.paths))

    def noise(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n t"]:
        """See ``Paths``; the same for all outputs."""
        return self.paths[0].noise(x).unsqueeze(1).expand(-1, self.num_outputs)

    def covariances(self, x: Float[Tensor, "b q d"]) -> list[Tensor]:
        """See ``Paths``; outputs that share an operator have the same."""
        prior, found = self.paths[0].prior, {}
        for outputs, variances in zip(self._groups, self._variances, strict=True):
            found.update(dict.fromkeys(outputs, _blocks(prior, variances, x)))
        return [found[output] for output in range(len(self.paths))]

    def joint(self, x: Tensor, noise: Tensor | None) -> MultitaskMultivariateNormal:
        """Outputs are independent: their functions say nothing about each other."""
        mean, _ = self.evaluate(x, deviations=False)
        scale = x.new_tensor(self.paths[0].units.scale)
        count = len(self.paths)
        roots = [path.covariance(x, scale, count) for path in self.paths]
        if isinstance(roots[0], RootLinearOperator):
            covariance = RootLinearOperator(
                torch.stack([root.root.to_dense() for root in roots])
            )
        else:
            covariance = DenseLinearOperator(
                torch.stack([found.to_dense() for found in roots])
            )
        if noise is not None:
            noise = noise.mT.contiguous()
        return MultitaskMultivariateNormal.from_batch_mvn(
            MultivariateNormal(mean.mT.contiguous(), _plus(covariance, noise))
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


@outside_inference_mode
def _blocks(
    prior: Prior, variances: Variances, x: Float[Tensor, "b q d"]
) -> Float[Tensor, "b q q"]:
    """Exact posterior covariances of batches of points."""
    inputs = prior.evaluate(x.flatten(0, 1))[1]
    found = variances.covariance(inputs.reshape(*x.shape[:2], inputs.shape[-1]))
    assert found is not None
    return found


def _plus(covariance: LinearOperator, noise: Tensor | None) -> LinearOperator:
    """The covariance with noise on its diagonal, unevaluated."""
    return covariance if noise is None else covariance + DiagLinearOperator(noise)
