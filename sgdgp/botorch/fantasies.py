"""Models given observations that were not made: fantasies, in batches.

Knowledge-gradient acquisitions ask what a model would say after observing y at u, for
many y and u at once, and for the derivative in u. No posterior is solved again: one
moves by its gain (``kalman_gain.py``), from solves for the few points u alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.posteriors.gpytorch import GPyTorchPosterior
from botorch.sampling.base import MCSampler
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from torch import Size, Tensor

from sgdgp.botorch.function_model import FunctionModel, select_outputs
from sgdgp.botorch.kalman_gain import Gain
from sgdgp.botorch.outputs import (
    Evaluated,
    Outputs,
    Units,
    among,
    noise_variances,
)
from sgdgp.botorch.posterior import Cursor, Noise


@dataclass(frozen=True, eq=False)
class Site:
    """Points u that are observed beside the data, for some outputs of one posterior.

    Attributes:
        outputs: The outputs.
        u: Points (*b, q, d).
        variances: Of the noise (*b, q, m), in the units of ``outputs.evaluate``.
        seed: Of the noise of each sample function there.
    """

    outputs: Outputs
    u: Tensor
    variances: Tensor
    seed: int

    @property
    def batch_shape(self) -> Size:
        """The batches *b."""
        return self.u.shape[:-2]

    @cached_property
    def mean(self) -> Tensor:
        """Posterior mean at u (*b, q, m)."""
        return self.outputs.evaluate(self.u, ())[0]

    @cached_property
    def gains(self) -> tuple[tuple[tuple[int, ...], Gain], ...]:
        """Columns and gain of each group of correlated outputs."""
        u = self.u.reshape(-1, *self.u.shape[-2:])
        gains = []
        for block in self.outputs.blocks():
            variances = self.variances[..., list(block.columns)].reshape(len(u), -1)
            gains.append((block.columns, Gain(block, u, variances)))
        return tuple(gains)

    def deviations(self, index: tuple[int, ...] | None) -> Tensor:
        """f_s(u) + eps_s - mean(u) of every function (s, *b, q, m)."""
        _, deviations = self.outputs.evaluate(self.u, index)
        count = self.outputs.num_paths
        noise = Noise.drawn(self.seed, "noise of fantasies", count, self.variances)
        return deviations + noise.values(index)


@dataclass(frozen=True, eq=False)
class FantasyOutputs(Evaluated):
    """Outputs of one posterior, given observations at a site.

    Attributes:
        site: Where they were made.
        residuals: y - mean(u) in the units of ``evaluate`` (*f, *b, q, m).
        columns: Which of the site's outputs, in this order.
    """

    site: Site
    residuals: Tensor
    columns: tuple[int, ...]
    _moves: dict[tuple[int, ...] | None, Tensor] = field(default_factory=dict)

    @property
    def num_paths(self) -> int:
        return self.site.outputs.num_paths

    @property
    def units(self) -> Units:  # type: ignore[override]
        """What values still have to pass through, where it is not affine."""
        return self.site.outputs.units.subset(list(self.columns))

    @property
    def scale(self) -> Tensor:
        return self.site.outputs.scale[list(self.columns)]

    @property
    def is_small(self) -> bool:
        return self.site.outputs.is_small

    @property
    def is_independent(self) -> bool:
        return self.site.outputs.is_independent or len(self.columns) == 1

    def noise(self, x: Tensor) -> Tensor:
        return self.site.outputs.noise(x)[..., list(self.columns)]

    def variance(self, x: Tensor) -> Tensor:
        """Variances (*f, *b, q', m), less what the site explains of them."""
        x = self._placed(x)
        site, batch = self.site, self.site.batch_shape
        before = site.outputs.variance(x)
        explained = torch.zeros_like(before)
        for columns, gain in site.gains:
            matrix = _at(gain, x, len(batch))
            covariance = gain.covariance.reshape(*batch, *gain.covariance.shape[-2:])
            squares = (matrix @ covariance * matrix).sum(-1)
            explained = explained.index_add(
                -1,
                torch.tensor(columns, device=x.device),
                squares.unflatten(-1, (-1, len(columns))),
            )
        # No more than rounding can be left.
        least = torch.finfo(x.dtype).eps * before
        left = torch.maximum(before - explained, least)
        return left[..., list(self.columns)]

    def covariances(self, x: Tensor) -> Iterator[tuple[list[int], Tensor]]:
        """Covariances at (*f, *b, q', d), less what the site explains of them."""
        x = self._placed(x)
        site, batch = self.site, self.site.batch_shape
        known = site.outputs.covariances(x)
        for (columns, gain), (_, before) in zip(site.gains, known, strict=True):
            own = [place for place, c in enumerate(self.columns) if c in columns]
            if not own:
                continue
            matrix = _at(gain, x, len(batch))
            covariance = gain.covariance.reshape(*batch, *gain.covariance.shape[-2:])
            left = before - matrix @ covariance @ matrix.mT
            inside = [columns.index(self.columns[place]) for place in own]
            yield own, among(left, inside, len(columns), x.new_ones(len(own)))

    def subset(self, outputs: Sequence[int]) -> FantasyOutputs:
        return replace(self, columns=tuple(self.columns[i] for i in outputs))

    def evaluate(
        self, x: Tensor, index: tuple[int, ...] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Means (*f, *b, q', m), and what functions add to them (s, *f, *b, q', m).

        Args:
            x: Points (*b, q', d), shared by the fantasies, or (*f, *b, q', d).
            index: Numbers of the functions. Default: all; () for none.
        """
        x = self._placed(x)
        site, batch = self.site, self.site.batch_shape
        ahead = x.ndim - 2 - len(batch)
        before = self.residuals.ndim - 2 - len(batch)
        residuals = _padded(self.residuals, 0, ahead - before)
        mean, deviations = site.outputs.evaluate(x, index)
        moved = None
        if index != ():
            moved = _padded(self._moved(index), 1, ahead)
        order: list[int] = []
        changes, moves = [], []
        for columns, gain in site.gains:
            if not set(columns) & set(self.columns):
                continue
            order.extend(columns)
            matrix = _at(gain, x, len(batch))
            changes.append(_applied(matrix, residuals[..., list(columns)]))
            if moved is not None:
                moves.append(_applied(matrix, moved[..., list(columns)]))
        pick = [order.index(column) for column in self.columns]
        wanted = list(self.columns)
        mean = mean[..., wanted] + torch.cat(changes, dim=-1)[..., pick]
        deviations = deviations[..., wanted]
        if moves:
            deviations = deviations - torch.cat(moves, dim=-1)[..., pick]
        return mean, deviations.expand(len(deviations), *mean.shape)

    def _placed(self, x: Tensor) -> Tensor:
        """Points (*f, *b, q', d), with 1 for what fantasies share."""
        batch = self.site.batch_shape
        before = self.residuals.ndim - 2 - len(batch)
        leading: tuple[int, ...] = x.shape[: max(0, x.ndim - 2 - len(batch))]
        ahead = max(len(leading), before)
        leading = (*(1,) * (ahead - len(leading)), *leading)
        return x.expand(*leading, *batch, *x.shape[-2:])

    def _moved(self, index: tuple[int, ...] | None) -> Tensor:
        if index not in self._moves:
            self._moves.clear()
            self._moves[index] = self.site.deviations(index)
        return self._moves[index]


def _padded(values: Tensor, place: int, count: int) -> Tensor:
    """With so many dimensions of size one more, from that place on."""
    return values.reshape(*values.shape[:place], *(1,) * count, *values.shape[place:])


def _at(gain: Gain, x: Tensor, batches: int) -> Tensor:
    """G (*f, *b, rows of x, rows of u) at x (*f, *b, q', d)."""
    ahead = x.ndim - 2 - batches
    first = [ahead + i for i in range(batches)]
    # Everything in front of a batch is points of that batch.
    points = x.movedim(first, list(range(batches)))
    matrix = gain.at(points.reshape(prod(points.shape[:batches]), -1, x.shape[-1]))
    matrix = matrix.reshape(*points.shape[:-2], -1, matrix.shape[-1])
    return matrix.movedim(list(range(batches)), first)


def _applied(matrix: Tensor, values: Tensor) -> Tensor:
    """G times values (..., q, T): (..., q', T)."""
    product = (matrix @ values.flatten(-2).unsqueeze(-1)).squeeze(-1)
    return product.unflatten(-1, (-1, values.shape[-1]))


class FantasyModel(FunctionModel):
    """A model given observations that were not made: y (*f, *b, q, m) at u (*b, q, d).

    Mean and samples are those of the posterior of all data and these, exactly but for
    the Monte-Carlo error of variances; hyperparameters stay. Differentiable in u and y.
    """

    def __init__(
        self,
        outputs: Sequence[Outputs],
        u: Tensor,
        y: Tensor | None,
        noise: Tensor | None,
        seed: int,
        cursor: Cursor,
        sampler: MCSampler | None = None,
    ) -> None:
        """Fantasies of the outputs of a model.

        Args:
            outputs: The outputs.
            u: Points (*b, q, d).
            y: Observations (*f, *b, q, m) in the user's units; None to draw them.
            noise: Noise variances (*b, q, m) in the units after outcome transforms.
                Default: the likelihood's.
            seed: Of the noise of each sample function.
            cursor: What ``rsample`` goes on from.
            sampler: What draws them.
        """
        super().__init__()
        self.seed = seed
        self.cursor = cursor
        widths = [len(part.columns) for part in outputs]
        variances = noise_variances(outputs, u, noise, u.shape[:-2])
        sites = [
            Site(part, u, own, seed)
            for part, own in zip(outputs, variances.split(widths, dim=-1), strict=True)
        ]
        mean = torch.cat([site.mean for site in sites], dim=-1)
        if y is None:
            assert sampler is not None
            latent = _drawn(sites, mean, sampler)
        else:
            parts = [
                own if part.units.is_affine else part.units.latent(own, u)
                for part, own in zip(outputs, y.split(widths, dim=-1), strict=True)
            ]
            latent = torch.cat(parts, dim=-1)
        residuals = latent - mean
        self._batch_shape = residuals.shape[:-2]
        self._parts = tuple(
            FantasyOutputs(site, own, tuple(range(own.shape[-1])))
            for site, own in zip(sites, residuals.split(widths, dim=-1), strict=True)
        )

    @property
    def num_outputs(self) -> int:
        return sum(len(part.columns) for part in self._parts)

    @property
    def batch_shape(self) -> Size:
        """The fantasies *f and the batches *b."""
        return self._batch_shape

    def subset_output(self, idcs: list[int]) -> FantasyModel:
        other = copy.copy(self)
        other._parts = select_outputs(self._parts, idcs)
        return other

    def condition_on_observations(self, X: Tensor, Y: Tensor, **kwargs: Any) -> Model:
        """Not supported: raises ``UnsupportedError``."""
        raise UnsupportedError(_NO_MORE)

    def fantasize(self, X: Tensor, sampler: MCSampler, **kwargs: Any) -> Model:
        """Not supported: raises ``UnsupportedError``."""
        raise UnsupportedError(_NO_MORE)

    def _evaluated(self) -> tuple[FantasyOutputs, ...]:
        return self._parts


_NO_MORE = (
    "fantasies of fantasies are not supported; use one step of lookahead "
    "(qKnowledgeGradient), or condition_on_observations with data that were made"
)


def _drawn(sites: Sequence[Site], mean: Tensor, sampler: MCSampler) -> Tensor:
    """Observations (*f, *b, q, m) from the predictive distribution at u."""
    points, width = mean.shape[-2:]
    covariance = mean.new_zeros(*mean.shape[:-2], points * width, points * width)
    start = 0
    for site in sites:
        for columns, gain in site.gains:
            outputs = mean.new_tensor([start + column for column in columns]).long()
            rows = torch.arange(points, device=mean.device) * width
            rows = (rows.unsqueeze(1) + outputs).flatten()
            block = gain.covariance.reshape(*site.batch_shape, len(rows), len(rows))
            covariance[..., rows.unsqueeze(1), rows] = block
        start += len(site.outputs.columns)
    if width == 1:
        normal = MultivariateNormal(mean.squeeze(-1), covariance)
    else:
        normal = MultitaskMultivariateNormal(mean, covariance)
    return sampler(GPyTorchPosterior(normal))
