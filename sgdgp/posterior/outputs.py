"""Posteriors of several outputs: the verbs of one output, with an axis of outputs last.

Two kinds. A *multitask* model is a model of one output over pairs of input and task,
so its posterior is one over pairs (``multitask``). *Independent* outputs share kernel
and noise, and are posteriors side by side that came from one solve (``independent``).
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.core.checks import check_count, check_finite
from sgdgp.core.slices import slices
from sgdgp.gpytorch_adapter import has_fixed_noise
from sgdgp.posterior.functions import Points
from sgdgp.posterior.output_paths import OutputFunctions, OutputPaths
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.storage import save
from sgdgp.solvers.base import Solution


class OutputMarginals(NamedTuple):
    """Mean and variance of every output at each point on its own.

    Attributes:
        mean: (n', T).
        variance: (n', T).
    """

    mean: Tensor
    variance: Tensor


def given_noise(noise: Tensor, n: int, outputs: int) -> Float[Tensor, "n t"]:
    """Noise variances (n, T), of those for all outputs alike (n,) or for each.

    Raises:
        ValueError: Shape or values do not fit.
    """
    if noise.shape == (n,):
        noise = noise.unsqueeze(1).expand(n, outputs)
    if noise.shape != (n, outputs):
        raise ValueError(
            f"noise: expected variances of shape ({n}, {outputs}) or ({n},), found "
            f"{tuple(noise.shape)}"
        )
    bad = ~(torch.isfinite(noise) & (noise > 0))
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"noise: expected positive finite variances, found {int(bad.sum())} that "
            f"are not, the first at index {first}: {float(noise[first])}"
        )
    return noise


def new_targets(y: Tensor, n: int, outputs: int) -> Float[Tensor, "n t"]:
    """Targets of new inputs (n, T), checked; NaN where there is none.

    Raises:
        TypeError: Not a tensor.
        ValueError: The shape does not fit, or there is no target at all.
    """
    if not torch.is_tensor(y):
        raise TypeError(f"y_new: expected a torch.Tensor, found {type(y).__name__}")
    if y.shape != (n, outputs):
        raise ValueError(
            f"y_new: expected shape ({n}, {outputs}), found {tuple(y.shape)}"
        )
    if bool(torch.isnan(y).all()):
        raise ValueError("y_new: expected targets, found NaN in every row")
    check_finite("y_new", torch.where(torch.isnan(y), torch.zeros_like(y), y))
    return y.detach()


@dataclass(frozen=True, eq=False)
class MultiOutputPosterior(ABC):
    """A Gaussian process posterior of T outputs, made of functions.

    Attributes:
        solution: The solve behind it; of every output the mean, then its samples. With
            several solves (outputs observed in different rows) their sum.
        num_samples: Number of posterior sample functions, of each output.
        timings: Seconds for "prior_draws" and "solve".
        paths: The functions of x.
        parts: The posteriors of one output that it is made of; of a multitask model
            one over pairs of input and task.
    """

    solution: Solution
    num_samples: int
    timings: dict[str, float]
    paths: OutputPaths = field(repr=False)
    parts: tuple[PathwisePosterior, ...] = field(repr=False)
    kind: ClassVar[str]

    @property
    def num_outputs(self) -> int:
        """Number of outputs T."""
        return self.paths.num_outputs

    @property
    def functions(self) -> OutputFunctions:
        """The posterior's own sample functions, x (n', d) -> (num_samples, n', T)."""
        self._need_samples("functions")
        return OutputFunctions(self.paths, self.solution)

    def __call__(self, x: Points) -> Float[Tensor, "s *b n t"]:
        """Values of the sample functions; same as ``samples``."""
        return self.samples(x)

    def mean(self, x: Points) -> Float[Tensor, "*b n t"]:
        """Posterior means (n', T), differentiable in x.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.paths.flattened(x)
        mean, _ = self.paths.evaluate(flat, deviations=False)
        return mean.reshape(*shape, self.num_outputs)

    def variance(self, x: Points) -> Float[Tensor, "*b n t"]:
        """Posterior variances of the outputs (n', T), without observation noise.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        self._need_samples("variance")
        flat, shape = self.paths.flattened(x)
        _, deviations = self.paths.evaluate(flat, deviations=True)
        return deviations.square().mean(-1).reshape(*shape, self.num_outputs)

    def samples(self, x: Points) -> Float[Tensor, "s *b n t"]:
        """Joint samples (num_samples, n', T): the same functions on every call.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        return self.functions(x)

    def predict(
        self,
        x: Points,
        *,
        observation_noise: bool | Tensor = False,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> MultitaskMultivariateNormal | OutputMarginals:
        """Predictive distribution at x, jointly or point by point.

        Args:
            x: Inputs (n', d).
            observation_noise: Add the likelihood's noise; or the noise variances
                (n', T), or (n',) for all outputs alike, needed where the likelihood
                only knows the noise of its training points.
            batch_size: Points at a time. Default: all of them, jointly.
            progress: Show a progress bar over the batches.

        Returns:
            Without ``batch_size`` a GPyTorch ``MultitaskMultivariateNormal`` over all
            points and outputs. With it, ``OutputMarginals(mean, variance)``, (n', T).

        Raises:
            ValueError: There are no samples, x or the noise does not fit, or noise is
                asked of a likelihood that does not know it.
        """
        self._need_samples("predict")
        flat, shape = self.paths.flattened(x)
        if len(shape) != 1:
            found = (*shape, flat.shape[1])
            raise ValueError(f"x: expected shape (n, {found[-1]}), found {found}")
        noise = self._noise(flat, observation_noise)
        if batch_size is None:
            mean, deviations = self.paths.evaluate(flat, deviations=True)
            return self._joint(mean, deviations / self.num_samples**0.5, noise)
        check_count("batch_size", batch_size, 1)
        mean = flat.new_empty(len(flat), self.num_outputs)
        variance = torch.empty_like(mean)
        with torch.no_grad():
            for rows in tqdm(
                list(slices(len(flat), batch_size)),
                desc="predict",
                disable=not progress,
            ):
                mean[rows], values = self.paths.evaluate(flat[rows], deviations=True)
                variance[rows] = values.square().mean(-1)
        return OutputMarginals(mean, variance if noise is None else variance + noise)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything needed to predict the same numbers in a new process.

        Args:
            path: The file; see ``PathwisePosterior.save``.
        """
        save(self.kind, [part.solved for part in self.parts], path)

    @abstractmethod
    def draw(self, k: int, *, seed: int | torch.Generator = 1) -> OutputFunctions:
        """Draw k new posterior functions of all outputs; costs a solve.

        Args:
            k: Number of functions.
            seed: Seed or generator of the new prior draws and noise.

        Returns:
            A callable x (n', d) -> (k, n', T), differentiable in x.
        """

    @abstractmethod
    def update(
        self,
        x_new: Points,
        y_new: Float[Tensor, "m t"],
        *,
        noise: Float[Tensor, "m t"] | Float[Tensor, " m"] | None = None,
        **settings: Any,
    ) -> MultiOutputPosterior:
        """The posterior given more data, warm-started, with the same prior draws.

        Args:
            x_new: New inputs (m, d).
            y_new: Their targets (m, T), NaN where there is none.
            noise: Their noise variances, in the units of the targets squared; needed
                where the likelihood does not know them.
            **settings: As for ``PathwisePosterior.update``.

        Returns:
            A new posterior; this one stays valid.

        Raises:
            ValueError: Shapes or values do not fit.
        """

    @abstractmethod
    def _joint(
        self, mean: Tensor, root: Tensor, noise: Tensor | None
    ) -> MultitaskMultivariateNormal:
        """A normal of mean (n, T) with the covariance of ``root`` (n, T, s)."""

    @abstractmethod
    def likelihood_noise(self, x: Tensor) -> Tensor:
        """Noise variances (n, T) in the units of the targets."""

    def _noise(self, x: Tensor, wanted: bool | Tensor) -> Tensor | None:
        if isinstance(wanted, Tensor):
            return given_noise(wanted, len(x), self.num_outputs).to(x)
        if not wanted:
            return None
        if has_fixed_noise(self.parts[0].paths.prior.model.likelihood):
            raise ValueError(
                "observation_noise: the likelihood only knows the noise of its training"
                f" points; pass the noise variances at x as a tensor ({len(x)}, "
                f"{self.num_outputs})"
            )
        with torch.no_grad():
            return self.likelihood_noise(x)

    def _need_samples(self, what: str) -> None:
        if self.num_samples == 0:
            raise ValueError(
                f"{what}: the posterior has no samples (num_samples=0), only a mean; "
                "condition with num_samples >= 1 or use draw"
            )
