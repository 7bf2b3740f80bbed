"""A BoTorch posterior whose samples are the values of functions, and its sampler.

The functions are numbered. Number i < S is sample function i; number S + i is its
mirror image 2 mean - f_i, another draw of the same distribution, which makes averages
over both exact in everything that is odd around the mean. Where variances are known
exactly, averages over all of them are exact in second moments too: at each point their
deviations are scaled to the variance there. Fewer functions are as they are.

Where few data make covariances exact, BoTorch's normal samplers draw from these, as
they do for its own models, and are what it finds: quasi-random numbers know the tail
that an improvement lives in better than as many independent functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from botorch.acquisition.objective import (
    ExpectationPosteriorTransform,
    PosteriorTransform,
    ScalarizedPosteriorTransform,
)
from botorch.posteriors.posterior import Posterior
from botorch.sampling.base import MCSampler
from botorch.sampling.get_sampler import GetSampler
from botorch.sampling.normal import IIDNormalSampler, SobolQMCNormalSampler
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor
from torch.quasirandom import SobolEngine

from sgdgp.botorch.outputs import Evaluated, evaluate_all, in_user_units
from sgdgp.core.seeds import derived_generator, standard_normal


class Cursor:
    """Which functions were given out already."""

    def __init__(self) -> None:
        """Start at the first one."""
        self.position = 0

    def take(self, count: int) -> Tensor:
        """The next numbers (count,), to be taken modulo the number of functions."""
        start = self.position
        self.position += count
        return torch.arange(start, start + count, device="cpu")


@dataclass(frozen=True, eq=False)
class Noise:
    """Observation noise: variances (*b, q, m) and standard draws (S, q, m)."""

    variances: Tensor
    draws: Tensor

    @classmethod
    def drawn(cls, seed: int, purpose: str, count: int, variances: Tensor) -> Noise:
        """Noise of so many functions; fewer points have the same draws."""
        generator = derived_generator(seed, purpose)
        points, width = variances.shape[-2:]
        draws = [
            standard_normal(count, width, like=variances, generator=generator)
            for _ in range(points)
        ]
        return cls(variances, torch.stack(draws, dim=1))

    def values(self, index: tuple[int, ...] | None) -> Tensor:
        """Noise of all functions or some (s, *b, q, m), alike in every t-batch."""
        count, *joint = self.draws.shape
        draws = self.draws.reshape(count, *(1,) * (self.variances.ndim - 2), *joint)
        draws = draws if index is None else draws[list(index)]
        return draws * self.variances.sqrt()


class PathPosterior(Posterior):
    """Posterior at x (*b, q, d): mean, variance and values of S functions.

    Nothing is evaluated before it is asked for, and samplers that want fewer than S
    functions evaluate only those. Mean and variance are those of
    ``sgdgp.PathwisePosterior``, which do not come from the functions, unless an outcome
    transform is not affine: then both are those of the values. Variances of sums over
    correlated outputs or points have the correlations of the functions.
    """

    def __init__(
        self,
        outputs: Sequence[Evaluated],
        x: Tensor,
        *,
        batch_shape: torch.Size,
        cursor: Cursor | None = None,
        noise: Noise | None = None,
        transform: PosteriorTransform | None = None,
    ) -> None:
        """A posterior of outputs side by side.

        Args:
            outputs: What to evaluate.
            x: Inputs (*b, q, d).
            batch_shape: Of the posterior; x may lack dimensions of it.
            cursor: What ``rsample`` goes on from. Default: the first function.
            noise: Observation noise on top.
            transform: An affine posterior transform.
        """
        self._outputs = tuple(outputs)
        self._x = x
        self._cursor = Cursor() if cursor is None else cursor
        self._noise = noise
        self._transform = transform
        width = sum(len(output.columns) for output in outputs)
        self._latent_shape = torch.Size([*batch_shape, x.shape[-2], width])
        self._shape = _after(transform, self._latent_shape)
        self._mean: Tensor | None = None
        self._all: tuple[Tensor, Tensor] | None = None
        self._known: Tensor | None = None

    @property
    def num_paths(self) -> int:
        """Number of sample functions S."""
        return self._outputs[0].num_paths

    @property
    def device(self) -> torch.device:
        return self._x.device

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    @property
    def distribution(self) -> Any:
        """None: raises an AttributeError that says so."""
        raise AttributeError(_NO_DISTRIBUTION)

    mvn = distribution

    @property
    def batch_shape(self) -> torch.Size:
        """The t-batches *b."""
        return self._shape[:-2]

    @property
    def base_sample_shape(self) -> torch.Size:
        """Of normal base samples (*b, q, m); else () for numbers of functions."""
        return self._latent_shape if self.has_covariances else torch.Size()

    @property
    def batch_range(self) -> tuple[int, int]:
        """T-batches of the base samples, which all have the same."""
        return (0, -2) if self.has_covariances else (0, 0)

    @property
    def has_covariances(self) -> bool:
        """Whether covariances are exact, so that normal samplers can draw from them."""
        return all(output.is_small for output in self._outputs)

    def _extended_shape(
        self,
        sample_shape: torch.Size = torch.Size(),  # noqa: B008
    ) -> torch.Size:
        return torch.Size([*sample_shape, *self._shape])

    @property
    def mean(self) -> Tensor:
        """Posterior mean (*b, q, m)."""
        if self._mean is None:
            if self._is_affine:
                self._mean = self._applied(self._evaluated(())[0])
            else:
                self._mean = self._everything().mean(0)
        return self._mean

    @property
    def variance(self) -> Tensor:
        """Posterior variance (*b, q, m)."""
        if self._is_affine:
            if self._transform is None:
                return self._marginals()
            independent = all(output.is_independent for output in self._outputs)
            if independent and isinstance(
                self._transform, ScalarizedPosteriorTransform
            ):
                weights = cast(Tensor, self._transform.weights).to(self._x)
                return (self._marginals() @ weights.square()).unsqueeze(-1)
        return (self._everything() - self.mean).square().mean(0)

    @property
    def values(self) -> Tensor:
        """Values of all sample functions (S, *b, q, m)."""
        return self._values(None, mirrored=False)

    def rsample(self, sample_shape: torch.Size | None = None) -> Tensor:
        """Values (*sample_shape, *b, q, m) of functions that were not used before.

        Every call goes on where the last one of the same model ended; all 2 S
        functions (the mirror images last) are used before any of them repeats.

        Args:
            sample_shape: How many. Default: one.
        """
        shape = torch.Size(sample_shape or [1])
        return self._chosen(self._cursor.take(shape.numel())).reshape(
            self._extended_shape(shape)
        )

    def rsample_from_base_samples(
        self, sample_shape: torch.Size, base_samples: Tensor
    ) -> Tensor:
        """Values (*sample_shape, *b, q, m) of the functions with these numbers.

        Args:
            sample_shape: How many.
            base_samples: Their numbers, modulo 2 S, in this shape. Or the draws of one
                of BoTorch's normal samplers: (*sample_shape, *b, q, m) draws from the
                joint distribution where covariances are exact, else, in the sample
                shape, only their order is used.

        Raises:
            ValueError: The base samples do not have the sample shape.
        """
        if base_samples.is_floating_point() and self.has_covariances:
            return self._applied(self._drawn(sample_shape, base_samples))
        if base_samples.shape[: len(sample_shape)] != sample_shape or (
            base_samples.numel() != sample_shape.numel()
        ):
            raise ValueError(
                f"base_samples: expected shape {tuple(sample_shape)}, found "
                f"{tuple(base_samples.shape)}"
            )
        numbers = base_samples.flatten()
        if numbers.is_floating_point():
            numbers = numbers.argsort().argsort()
        return self._chosen(numbers).reshape(self._extended_shape(sample_shape))

    def quantile(self, value: Tensor) -> Tensor:
        """Marginal quantiles (k, *b, q, m) at probabilities (k,)."""
        if self._is_affine:
            normal = torch.distributions.Normal(self.mean, self.variance.sqrt())
            return normal.icdf(value.to(self.mean).reshape(-1, *(1,) * self.mean.ndim))
        return torch.quantile(self._everything(), value.to(self.mean).flatten(), dim=0)

    @property
    def _is_affine(self) -> bool:
        return all(output.units.is_affine for output in self._outputs)

    def _chosen(self, numbers: Tensor) -> Tensor:
        """Functions of these numbers (k,), each evaluated once."""
        count = self.num_paths
        numbers = numbers.remainder(2 * count)
        functions = numbers.remainder(count)
        mirrored = numbers >= count
        if len(numbers.unique()) == 2 * count:
            return self._everything().index_select(0, numbers.to(self.device))
        index = None
        wanted, position = functions.unique(return_inverse=True)
        if self._all is None and 2 * len(wanted) <= count:
            index, functions, count = tuple(wanted.tolist()), position, len(wanted)
        values = self._values(index, mirrored=bool(mirrored.any()))
        rows = (functions + count * mirrored).to(self.device)
        return values.index_select(0, rows)

    def _drawn(self, shape: torch.Size, normals: Tensor) -> Tensor:
        """Joint draws (*shape, *b, q, m) of all outputs, before transforms."""
        if normals.shape[: len(shape)] != shape or (
            normals.shape[-2:] != self._latent_shape[-2:]
        ):
            raise ValueError(
                f"base_samples: expected shape {(*shape, *self._latent_shape)}, found "
                f"{tuple(normals.shape)}"
            )
        order: list[int] = []
        parts = []
        start = 0
        for output in self._outputs:
            for places, covariance in output.covariances(self._x):
                columns = [start + place for place in places]
                if self._noise is not None:
                    noise = self._noise.variances[..., columns].flatten(-2)
                    root = _root(covariance + torch.diag_embed(noise))
                else:
                    root = _root(covariance)
                own = normals[..., columns].flatten(-2).unsqueeze(-1)
                drawn = (root @ own).squeeze(-1)
                parts.append(drawn.unflatten(-1, (-1, len(columns))))
                order.extend(columns)
            start += len(output.columns)
        mean, _ = self._evaluated(())
        deviations = torch.cat(torch.broadcast_tensors(*parts), dim=-1)
        values = mean + deviations[..., torch.tensor(order, device="cpu").argsort()]
        return values.expand(*shape, *self._latent_shape)

    def _values(self, index: tuple[int, ...] | None, *, mirrored: bool) -> Tensor:
        """Values of functions (k, *b, q, m), then those of their mirror images."""
        mean, deviations = self._evaluated(index)
        if self._noise is not None:
            deviations = deviations + self._noise.values(index)
        values = mean + deviations
        if mirrored:
            values = torch.cat([values, mean - deviations])
        return self._applied(values)

    def _everything(self) -> Tensor:
        """Values of all functions and mirror images (2 S, *b, q, m)."""
        mean, deviations = self._evaluated(None)
        if self._noise is not None:
            deviations = deviations + self._noise.values(None)
        if self.has_covariances:
            squares = deviations.square().mean(0)
            tiny = torch.finfo(squares.dtype).tiny
            ratio = self._marginals() / squares.clamp_min(tiny)
            deviations = deviations * ratio.sqrt()
        return self._applied(torch.cat([mean + deviations, mean - deviations]))

    def _marginals(self) -> Tensor:
        """Variances of all outputs (*b, q, m) before transforms, with the noise."""
        if self._known is None:
            parts = [output.variance(self._x) for output in self._outputs]
            known = torch.cat(parts, dim=-1)
            known = known.expand(*self.batch_shape, *known.shape[-2:])
            if self._noise is not None:
                known = known + self._noise.variances
            self._known = known
        return self._known

    def _applied(self, latent: Tensor) -> Tensor:
        """Units that are not affine, and the posterior transform."""
        latent = in_user_units(self._outputs, latent, self._x)
        if self._transform is None:
            return latent
        value = self._transform.evaluate(latent, self._x)
        scalar = isinstance(self._transform, ScalarizedPosteriorTransform)
        return value.unsqueeze(-1) if scalar else value

    def _evaluated(self, index: tuple[int, ...] | None) -> tuple[Tensor, Tensor]:
        """Means and deviations of all outputs; of all functions kept."""
        if self._all is not None and index in (None, ()):
            return self._all
        evaluated = evaluate_all(self._outputs, self._x, index)
        if index is None:
            self._all = evaluated
        return evaluated


_NO_DISTRIBUTION = (
    "a PathPosterior consists of functions and has no joint distribution in closed "
    "form, which qMaxValueEntropy and qJointEntropySearch ask for; give "
    "them the model's definition"
)


def _root(covariance: Tensor) -> Tensor:
    """Lower root (..., r, r), of the correlations in float64: free of units."""
    wide = covariance.double()
    variances = wide.diagonal(dim1=-2, dim2=-1)
    tiny = torch.finfo(wide.dtype).tiny
    deviations = variances.clamp_min(tiny).sqrt()
    scales = deviations.unsqueeze(-1) * deviations.unsqueeze(-2)
    root = psd_safe_cholesky(wide / scales)
    return (deviations.unsqueeze(-1) * root).to(covariance.dtype)


def is_affine(transform: PosteriorTransform) -> bool:
    """Whether a posterior transform is known to be affine in the outcomes."""
    return isinstance(
        transform, ScalarizedPosteriorTransform | ExpectationPosteriorTransform
    )


def _after(transform: PosteriorTransform | None, shape: torch.Size) -> torch.Size:
    """Shape of the mean after a posterior transform."""
    if transform is None:
        return shape
    if isinstance(transform, ExpectationPosteriorTransform):
        return torch.Size([*shape[:-2], shape[-2] // transform.n_w, shape[-1]])
    return torch.Size([*shape[:-1], 1])


class PathSampler(MCSampler):
    """Gives out sample functions by number, all of them before any repeats.

    Values at a point do not depend on where in a batch it stands. Seeds start at
    different functions, where there are more of them than samples.
    """

    def __init__(self, sample_shape: torch.Size, seed: int | None = None) -> None:
        """A sampler of so many functions.

        Args:
            sample_shape: Shape of the samples.
            seed: Where to start. Default: at the first function.
        """
        # BoTorch would take a missing seed from the global generator.
        super().__init__(sample_shape=sample_shape, seed=0 if seed is None else seed)

    def forward(self, posterior: Posterior) -> Tensor:
        """Values (*sample_shape, *b, q, m)."""
        assert isinstance(posterior, PathPosterior)
        if self.base_samples is None:
            count = self.sample_shape.numel()
            total = 2 * posterior.num_paths
            start = self.seed * count % total
            numbers = torch.arange(start, start + count, device="cpu") % total
            self.register_buffer("base_samples", numbers.reshape(self.sample_shape))
        numbers = self.base_samples
        assert isinstance(numbers, Tensor)
        return posterior.rsample_from_base_samples(self.sample_shape, numbers)

    def _update_base_samples(
        self, posterior: Posterior, base_sampler: MCSampler
    ) -> None:
        """Nothing to do: a function is the same function at new points."""


@GetSampler.register(PathPosterior)
def _sampler(
    posterior: PathPosterior, sample_shape: torch.Size, *, seed: int | None = None
) -> MCSampler:
    if not posterior.has_covariances:
        return PathSampler(sample_shape=sample_shape, seed=seed)
    numbers = posterior.base_sample_shape[-2:].numel()
    kind = SobolQMCNormalSampler if numbers <= SobolEngine.MAXDIM else IIDNormalSampler
    return kind(sample_shape=sample_shape, seed=seed)
