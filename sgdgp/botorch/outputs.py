"""Outputs of a model that can be evaluated, in the units and shapes of BoTorch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from torch import Tensor

from sgdgp.botorch.kalman_gain import Block
from sgdgp.gpytorch_adapter import MultitaskPrior, has_fixed_noise
from sgdgp.gpytorch_adapter.outcome_scale import affine_of
from sgdgp.operators.base import KernelOperator
from sgdgp.posterior import Posterior, SampleFunctions
from sgdgp.posterior.paths import Paths
from sgdgp.posterior.problem import Part
from sgdgp.posterior.variances import are_exact
from sgdgp.solvers.differentiable import DifferentiableSolve


@dataclass(frozen=True, eq=False)
class Units:
    """From a model's units to the user's: factor and shift (m,), or any transform.

    Attributes:
        shift: Of an affine transform (m,).
        factor: Of an affine transform (m,).
        transform: A frozen transform that is not affine, else None.
    """

    shift: Tensor
    factor: Tensor
    transform: OutcomeTransform | None = None

    @property
    def is_affine(self) -> bool:
        """Whether mean and variance pass through, and not only values."""
        return self.transform is None

    def values(self, latent: Tensor, x: Tensor) -> Tensor:
        """Values (..., m) in the user's units, of those in the model's."""
        if self.transform is None:
            return self.shift + self.factor * latent
        return self.transform.untransform(latent, X=x)[0]

    def latent(self, values: Tensor, x: Tensor) -> Tensor:
        """Values (..., m) in the model's units, of those in the user's."""
        if self.transform is None:
            return (values - self.shift) / self.factor
        return self.transform(values, X=x)[0]

    def subset(self, outputs: list[int]) -> Units:
        """Those of some of the outputs."""
        transform = self.transform
        if transform is not None:
            transform = transform.subset_output(outputs)
        return Units(self.shift[outputs], self.factor[outputs], transform)


def units_of(transform: OutcomeTransform, outputs: int, like: Tensor) -> Units:
    """The units behind a transform of m outputs that learns nothing more.

    Args:
        transform: A frozen transform.
        outputs: Number of outputs m.
        like: A tensor of the wanted dtype and device.
    """
    zeros = like.new_zeros(outputs)
    ones = torch.ones_like(zeros)
    try:
        affine = affine_of(transform, outputs, like.device)
    except (RuntimeError, ValueError, NotImplementedError, TypeError):
        # Whatever wants to see inputs is not one factor for all of them.
        affine = None
    if affine is None:
        return Units(zeros, ones, transform)
    shift, factor = affine
    return Units(shift.to(like), factor.to(like))


class Evaluated(ABC):
    """One or more outputs that can be evaluated: ``Outputs``, or those of fantasies.

    Attributes:
        columns: One entry for each output.
        units: What values still have to pass through, where it is not affine.
    """

    columns: tuple[int, ...]
    units: Units

    @property
    @abstractmethod
    def num_paths(self) -> int:
        """Number of sample functions."""

    @property
    @abstractmethod
    def scale(self) -> Tensor:
        """Factors (m,) from the definition's units to those of ``evaluate``."""

    @abstractmethod
    def evaluate(
        self, x: Tensor, index: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means (*b, q, m), and what functions add to them (s, *b, q, m).

        Of units that are not affine, both before them.

        Args:
            x: Inputs (*b, q, d).
            index: Numbers of the functions. Default: all; () for none.
        """

    @abstractmethod
    def variance(self, x: Tensor) -> Tensor:
        """Posterior variances (*b, q, m), in the units of ``evaluate`` squared."""

    @abstractmethod
    def covariances(self, x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Places of correlated outputs and their covariances, where ``is_small``.

        Args:
            x: Inputs (*b, q, d).

        Yields:
            Which r of these outputs, and (*b, q r, q r) in the units of ``evaluate``
            squared, outputs of one point side by side.
        """

    @property
    @abstractmethod
    def is_small(self) -> bool:
        """Whether covariances are exact and cheap, since there are few rows of data."""

    @property
    @abstractmethod
    def is_independent(self) -> bool:
        """Whether outputs tell nothing about each other."""

    @abstractmethod
    def noise(self, x: Tensor) -> Tensor:
        """Noise variances (*b, q, m); the average one where they are only known."""

    @abstractmethod
    def subset(self, outputs: Sequence[int]) -> Evaluated:
        """Some of the outputs, counted from the first of these."""


def among(block: Tensor, outputs: list[int], width: int, scale: Tensor) -> Tensor:
    """Covariances (..., q r, q r) of r outputs, scaled, of (..., q T, q T) of T."""
    points = block.shape[-1] // width
    rows = torch.arange(points, device=block.device) * width
    rows = (rows.unsqueeze(1) + rows.new_tensor(outputs)).flatten()
    factors = scale.repeat(points)
    return factors.unsqueeze(1) * block[..., rows.unsqueeze(1), rows] * factors


def evaluate_all(
    parts: Sequence[Evaluated], x: Tensor, index: tuple[int, ...] | None
) -> tuple[Tensor, Tensor]:
    """``Evaluated.evaluate`` of outputs side by side."""
    means, deviations = zip(*(part.evaluate(x, index) for part in parts), strict=True)
    return torch.cat(means, dim=-1), torch.cat(deviations, dim=-1)


def in_user_units(parts: Sequence[Evaluated], latent: Tensor, x: Tensor) -> Tensor:
    """Values (..., m) of outputs side by side, through units that are not affine."""
    if all(part.units.is_affine for part in parts):
        return latent
    columns = latent.split([len(part.columns) for part in parts], dim=-1)
    values = [
        own if part.units.is_affine else part.units.values(own, x)
        for part, own in zip(parts, columns, strict=True)
    ]
    return torch.cat(values, dim=-1)


def noise_variances(
    parts: Sequence[Evaluated], x: Tensor, given: Tensor | None, batch: torch.Size
) -> Tensor:
    """Noise variances (*batch, q, m) side by side, in the units of ``evaluate``.

    Args:
        parts: The outputs.
        x: Inputs (*b, q, d).
        given: In the units after outcome transforms. Default: the likelihood's.
        batch: What *b broadcasts to.
    """
    if given is None:
        variances = torch.cat([part.noise(x) for part in parts], dim=-1)
    else:
        variances = torch.cat([part.scale for part in parts]) ** 2 * given.to(x)
    width = sum(len(part.columns) for part in parts)
    return variances.expand(*batch, x.shape[-2], width)


@dataclass(frozen=True, eq=False)
class Outputs(Evaluated):
    """One or more outputs of one posterior.

    Attributes:
        posterior: The posterior of all of them.
        columns: Which of the posterior's outputs, in this order.
        units: Units on top of those that the posterior knows.
        functions: Sample functions that were drawn from it. Default: its own.
    """

    posterior: Posterior
    columns: tuple[int, ...]
    units: Units
    functions: SampleFunctions | None = None
    _subsets: dict[tuple[int, ...], Paths] = field(default_factory=dict, repr=False)
    _inverses: dict[KernelOperator, DifferentiableSolve] = field(
        default_factory=dict, repr=False
    )

    @property
    def num_paths(self) -> int:
        functions = self.functions
        return functions.num_functions if functions else self.posterior.num_samples

    def evaluate(
        self, x: Tensor, index: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        wanted = index != ()
        paths = self._paths(index or None) if wanted else self.posterior.exact
        flat, shape = paths.flattened(x)
        mean, deviations = paths.evaluate(flat, deviations=wanted)
        mean = self._columns(paths.units.shift + paths.units.scale * mean, 1)
        deviations = self._columns(paths.units.scale * deviations, 1)
        deviations = deviations.permute(2, 0, 1)
        mean = mean.reshape(*shape, mean.shape[-1])
        deviations = deviations.reshape(len(deviations), *mean.shape)
        factor = self.units.factor
        return self.units.shift + factor * mean, factor * deviations

    def variance(self, x: Tensor) -> Tensor:
        paths = self.posterior.exact
        flat, shape = paths.flattened(x)
        variance = self._columns(paths.moments(flat).variance, 1)
        scale = self.units.factor * paths.units.scale
        return scale**2 * variance.reshape(*shape, variance.shape[-1])

    def covariances(self, x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        paths = self.posterior.exact
        flat, shape = paths.flattened(x)
        points = flat.reshape(-1, shape[-1], flat.shape[-1])
        found = [
            block.reshape(*shape[:-1], *block.shape[1:])
            for block in paths.covariances(points)
        ]
        if isinstance(self.posterior.solved[0].problem.prior, MultitaskPrior):
            (block,) = found
            yield (
                list(range(len(self.columns))),
                among(block, self._own, self._width, self.scale),
            )
            return
        for place, column in enumerate(self.columns):
            yield [place], self.scale[place] ** 2 * found[column]

    @property
    def is_small(self) -> bool:
        parts = self.posterior.solved
        return all(are_exact(part.problem.operator) for part in parts)

    @property
    def is_independent(self) -> bool:
        several = isinstance(self.posterior.solved[0].problem.prior, MultitaskPrior)
        return not several or len(self.columns) == 1

    def each(self, x: Tensor, index: tuple[int, ...]) -> Tensor:
        """Function index[i] at its own points x[i]: (k, q, d) -> (k, q, m)."""
        paths = self._paths(index)
        flat, _ = paths.flattened(x)
        values = paths.each(flat.reshape(x.shape))
        values = self._columns(paths.units.shift + paths.units.scale * values, 2)
        return self.units.values(values, x)

    def noise(self, x: Tensor) -> Tensor:
        flat, shape = self.posterior.exact.flattened(x)
        parts = self.posterior.solved
        prior = parts[0].problem.prior
        with torch.no_grad():
            if has_fixed_noise(prior.model.likelihood):
                means = [
                    (part.problem.noise - prior.nugget).mean()
                    * part.problem.prior.outcome_scale.scale**2
                    for part in parts
                ]
                noise = torch.stack(means).expand(len(flat), self._width)
            else:
                noise = self.posterior.exact.noise(flat).reshape(len(flat), -1)
        own = noise[:, self._own].reshape(*shape, len(self.columns))
        return self.units.factor**2 * own

    def drawn(self, count: int, seed: int) -> Outputs:
        """The same outputs with that many new functions; costs a solve."""
        return replace(
            self, functions=self.posterior.draw(count, seed=seed), _subsets={}
        )

    @property
    def scale(self) -> Tensor:
        prior = self.posterior.solved[0].problem.prior
        scales = getattr(prior, "outcome_scales", (prior.outcome_scale,) * self._width)
        factors = self.units.factor.new_tensor([scale.scale for scale in scales])
        return factors[self._own] * self.units.factor

    def subset(self, outputs: Sequence[int]) -> Outputs:
        chosen = list(outputs)
        return replace(
            self,
            columns=tuple(self.columns[output] for output in chosen),
            units=self.units.subset(chosen),
        )

    def blocks(self) -> tuple[Block, ...]:
        """Groups of these outputs that are correlated, and how to solve for them."""
        parts, scale = self.posterior.solved, self.scale
        if isinstance(parts[0].problem.prior, MultitaskPrior):
            (part,) = parts
            everything = tuple(range(len(self.columns)))
            return (Block(part, self._inverse(part), everything, self.columns, scale),)
        return tuple(
            Block(part, self._inverse(part), (output,), None, scale[output].reshape(1))
            for output, part in enumerate(parts[column] for column in self.columns)
        )

    def _inverse(self, part: Part) -> DifferentiableSolve:
        """Outputs over the same rows share one."""
        key = part.problem.operator
        if key not in self._inverses:
            problem = part.problem
            self._inverses[key] = DifferentiableSolve(
                problem.operator,
                problem.noise,
                problem.solver,
                problem.settings.memory_budget,
                problem.settings.seed,
            )
        return self._inverses[key]

    @property
    def _width(self) -> int:
        """Outputs of the posterior."""
        return self.posterior.num_outputs or 1

    def _columns(self, values: Tensor, dim: int) -> Tensor:
        """These outputs of values that have those of the posterior along ``dim``."""
        if self.posterior.num_outputs is None:
            return values.unsqueeze(dim)
        return values.index_select(dim, values.new_tensor(self.columns).long())

    @property
    def _own(self) -> list[int]:
        return list(self.columns)

    def _paths(self, index: tuple[int, ...] | None) -> Paths:
        """All functions, or some; those last asked for are kept."""
        if index is None:
            return (self.functions or self.posterior).paths
        if index not in self._subsets:
            self._subsets.clear()
            self._subsets[index] = self._paths(None).subset(index)
        return self._subsets[index]
