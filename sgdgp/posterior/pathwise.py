"""The posterior as functions: mean, variance, samples, new draws, prediction."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import torch
from gpytorch.distributions import MultivariateNormal
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator, RootLinearOperator
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import generator_of_draws
from sgdgp.core.slices import slices
from sgdgp.gpytorch_adapter import has_fixed_noise
from sgdgp.posterior.functions import ConditionedPaths, Points, SampleFunctions
from sgdgp.posterior.problem import Problem
from sgdgp.posterior.storage import Solved, save
from sgdgp.solvers.base import Callback, Solution, Solver


class Marginals(NamedTuple):
    """Mean and variance of the posterior at each point on its own.

    Attributes:
        mean: (n',).
        variance: (n',).
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False)
class PathwisePosterior:
    """A Gaussian process posterior made of functions.

    Variances come from the zero-mean samples around the separately solved mean:
    they cannot be negative, and S samples give them a relative standard error of
    sqrt(2 / S) (18 % for 64). The mean carries no Monte-Carlo error.

    Attributes:
        solution: The solve behind it: solver, operator, weights (n, 1 + s), residuals
            (1 + s,), passes, reason, history, warnings. Column 0 is the mean.
        num_samples: Number of posterior sample functions.
        timings: Seconds for "prior_draws" and "solve".
        paths: The functions of x.
        problem: What was solved, and all that later solves need.
    """

    solution: Solution
    num_samples: int
    timings: dict[str, float]
    paths: ConditionedPaths = field(repr=False)
    problem: Problem = field(repr=False)
    kind: ClassVar[str] = "single"

    @property
    def parts(self) -> tuple[PathwisePosterior, ...]:
        """Posteriors of one output that it is made of: itself."""
        return (self,)

    @property
    def functions(self) -> SampleFunctions:
        """The posterior's own sample functions, x (n', d) -> (num_samples, n')."""
        self._need_samples("functions")
        return SampleFunctions(self.paths, self.solution)

    def __call__(self, x: Points) -> Float[Tensor, "s *b n"]:
        """Values of the sample functions; same as ``samples``."""
        return self.samples(x)

    def mean(self, x: Points) -> Float[Tensor, "*b n"]:
        """Posterior mean (n',), differentiable in x.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.paths.flattened(x)
        mean, _ = self.paths.mean_and_deviations(flat, num_deviations=0)
        units = self.paths.prior.target_scale
        return (units.shift + units.scale * mean).reshape(shape)

    def variance(self, x: Points) -> Float[Tensor, "*b n"]:
        """Posterior variance of the function (n',), without observation noise.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        self._need_samples("variance")
        flat, shape = self.paths.flattened(x)
        _, deviations = self.paths.mean_and_deviations(flat)
        scale = self.paths.prior.target_scale.scale
        return (scale**2 * deviations.square().mean(1)).reshape(shape)

    def samples(self, x: Points) -> Float[Tensor, "s *b n"]:
        """Joint samples (num_samples, n'): the same functions on every call.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        return self.functions(x)

    def draw(self, k: int, *, seed: int | torch.Generator = 1) -> SampleFunctions:
        """Draw k new posterior functions; costs a solve with k columns.

        Args:
            k: Number of functions.
            seed: Seed or generator of the new prior draws and noise.

        Returns:
            A callable x (n', d) -> (k, n'), differentiable in x.
        """
        check_count("k", k, 1)
        return self.problem.redraw(k, generator_of_draws(seed), self.solution)

    def update(
        self,
        x_new: Points,
        y_new: Float[Tensor, " m"] | Float[Tensor, "m 1"],
        *,
        noise: Float[Tensor, " m"] | float | None = None,
        solver: Solver | str | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> PathwisePosterior:
        """The posterior given new data as well; this one stays as it is.

        The same prior functions and noise draws are conditioned, so that every sample
        function moves only as far as the new data say, and the solve starts from
        the old weights, corrected around the new points. Hyperparameters stay.

        Args:
            x_new: New inputs (m, d) before the model's own transforms; of a model of
                several inputs all of them.
            y_new: New targets (m,) in the units of the user.
            noise: Noise variances of the new targets. Default: the likelihood's;
                needed where that only knows the noise of its training points.
            solver: A solver or a name. Default: that of this posterior.
            progress: Show a progress bar. Default: on a terminal.
            callback: Called as the solve advances; returning True stops it.

        Returns:
            A new posterior over n + m points, the same within the tolerance as
            conditioning on all of them with the same draws. Passes and seconds of its
            solution are those of the update; its solver is "local" where the correction
            was all it took.

        Raises:
            TypeError: Data or solver are of the wrong kind.
            ValueError: Shape, dtype, device or values do not fit, or noise is needed.
        """
        from sgdgp.posterior.update import updated

        return updated(
            self,
            x_new,
            y_new,
            noise=noise,
            solver=solver,
            progress=progress,
            callback=callback,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior into a file; ``sgdgp.load(path, model)`` reads it.

        The file (safetensors, with a checksum, no code) holds the data, parameters
        and buffers of the model, prior draws, weights, solver and history. A file in
        its place is replaced in one step.

        Args:
            path: The file; its directory must exist.

        Raises:
            NotStorableError: A feature map is not registered for storage.
            OSError: The file could not be written.
            StorageError: There is no such directory, or the path is one.
        """
        save(self.kind, [self.solved], path)

    @property
    def solved(self) -> Solved:
        """What a file holds of it."""
        return Solved(self.problem, self.solution, self.num_samples, self.timings)

    def predict(
        self,
        x: Points,
        *,
        observation_noise: bool | Tensor = False,
        batch_size: int | None = None,
        progress: bool = False,
    ) -> MultivariateNormal | Marginals:
        """Predictive distribution at x, jointly or point by point.

        Args:
            x: Inputs (n', d).
            observation_noise: Add the likelihood's noise; or the noise variances
                (n',) themselves, needed where the likelihood only knows the noise
                of its training points.
            batch_size: Points at a time. Default: all of them, jointly.
            progress: Show a progress bar over the batches.

        Returns:
            Without ``batch_size`` a GPyTorch ``MultivariateNormal`` whose covariance
            is the samples' (rank at most ``num_samples``) plus noise. With it,
            ``Marginals(mean, variance)`` in memory that does not grow with n'
            beyond the result.

        Raises:
            ValueError: There are no samples, x or the noise does not fit, or noise is
                asked of a likelihood that does not know it.
        """
        self._need_samples("predict")
        flat, shape = self.paths.flattened(x)
        if len(shape) != 1:
            raise ValueError(
                f"x: expected shape (n, {self.paths.dim}), found "
                f"{(*shape, self.paths.dim)}"
            )
        noise = self._noise_at(flat, observation_noise)
        units = self.paths.prior.target_scale
        if batch_size is None:
            mean, deviations = self.paths.mean_and_deviations(flat)
            root = (units.scale / self.num_samples**0.5) * deviations
            covariance = RootLinearOperator(root)
            if noise is not None:
                covariance = covariance + DiagLinearOperator(noise)
            return MultivariateNormal(units.shift + units.scale * mean, covariance)
        check_count("batch_size", batch_size, 1)
        mean, variance = flat.new_empty(len(flat)), flat.new_empty(len(flat))
        batches = list(slices(len(flat), batch_size))
        with torch.no_grad():
            for rows in tqdm(batches, desc="predict", disable=not progress):
                centre, deviations = self.paths.mean_and_deviations(flat[rows])
                mean[rows] = units.shift + units.scale * centre
                variance[rows] = units.scale**2 * deviations.square().mean(1)
        return Marginals(mean, variance if noise is None else variance + noise)

    def _noise_at(self, x: Tensor, wanted: bool | Tensor) -> Tensor | None:
        scale = self.paths.prior.target_scale.scale
        if isinstance(wanted, Tensor):
            if wanted.shape != (len(x),):
                raise ValueError(
                    f"observation_noise: expected {len(x)} variances, one per point, "
                    f"found shape {tuple(wanted.shape)}"
                )
            bad = ~(torch.isfinite(wanted) & (wanted > 0))
            if bad.any():
                first = int(bad.nonzero()[0])
                raise ValueError(
                    "observation_noise: expected positive finite variances, found "
                    f"{int(bad.sum())} that are not, the first at index {first}: "
                    f"{float(wanted[first])}"
                )
            return wanted.to(x)
        if not wanted:
            return None
        likelihood = self.paths.prior.model.likelihood
        if has_fixed_noise(likelihood):
            raise ValueError(
                "observation_noise: the likelihood only knows the noise of its training"
                f" points; pass the {len(x)} noise variances at x as a tensor"
            )
        with torch.no_grad():
            return scale**2 * self.paths.prior.noise(x)

    def _need_samples(self, what: str) -> None:
        if self.num_samples == 0:
            raise ValueError(
                f"{what}: the posterior has no samples (num_samples=0), only a mean; "
                "condition with num_samples >= 1 or use draw"
            )
