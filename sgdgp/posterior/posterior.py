"""The posterior as functions: mean, variance, samples, new draws, prediction."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import repeat
from typing import Any, Literal, NamedTuple, TypeVar, overload

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.core.checks import check_count, check_followers
from sgdgp.core.codec import fitting, read_values
from sgdgp.core.files import path_of, reads
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import generator_of_draws
from sgdgp.core.slices import slices
from sgdgp.core.summary import Summarised
from sgdgp.gpytorch_adapter import has_fixed_noise
from sgdgp.posterior.paths import Paths, Points, SampleFunctions, paths_of
from sgdgp.posterior.problem import Part, Problem, announce, groups_of
from sgdgp.posterior.storage import KIND, parts_from, save, without_recycled
from sgdgp.posterior.update import (
    Variances,
    draw_functions,
    update_parts,
    variances_of,
)
from sgdgp.posterior.variances import EXACT_ROWS
from sgdgp.solvers.base import Callback, Solution, Solver
from sgdgp.solvers.solutions import merged_solution

P = TypeVar("P", bound="Posterior")


class Marginals(NamedTuple):
    """Mean and variance of the posterior at each point on its own.

    Attributes:
        mean: (n',), of T outputs (n', T).
        variance: Of the same shape.
    """

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Posterior(Summarised):
    """A Gaussian process posterior made of functions, of one output or of several.

    Values have the shape (n',) where ``num_outputs`` is None and (n', T) else, written
    (n', *t) here.

    Neither mean nor, up to 2,000 rows, variances carry a Monte-Carlo error. With more
    rows variances are off by some per cent, see ``variance``; they are never negative.

    Attributes:
        solved: What was solved: a problem and its solution for each of independent
            outputs, for one output, or for the pairs of input and task of a multitask
            model.
        later: Gives the parts with their sample functions, where these are zero so
            far: nobody has asked for one.
    """

    solved: tuple[Part, ...]
    later: Callable[[], Sequence[Part]] | None = None

    def _facts(self) -> dict[str, Any]:
        # What was solved so far, without its weights: merging would copy them.
        bare = [
            replace(part.solution, weights=part.solution.weights[:, :0], history=())
            for part in self.solved
        ]
        found = merged_solution(bare, groups_of(self.solved))._facts()
        for name in ("weights", "seconds", "prediction_error"):
            found.pop(name, None)
        return {
            "points": len(self.solved[0].problem.x),
            "dim": self.exact.dim,
            "num_samples": self.num_samples,
            "num_outputs": self.num_outputs,
            **found,
        }

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """What was solved, with the sample functions."""
        if self.later is None:
            return self.solved
        found = outside_inference_mode(self.later)()
        return tuple(announce("condition", found))

    @cached_property
    def solution(self) -> Solution:
        """The solve behind it: weights (n, 1 + s), residuals (1 + s,), passes, reason.

        Column 0 is the mean. Of independent outputs the columns of each, one output
        after another; of several solves (outputs observed in different rows) their
        sum.
        """
        return merged_solution(
            [part.solution for part in self.parts], groups_of(self.parts)
        )

    @property
    def timings(self) -> dict[str, float]:
        """Seconds for "prior_draws" and "solve", of all solves so far."""
        parts = self.solved
        if self.later is not None:
            parts += self.__dict__.get("parts", ())
        first = [parts[group[0]].timings for group in groups_of(parts)]
        return {
            name: sum(timings.get(name, 0.0) for timings in first) for name in first[0]
        }

    @property
    def problem(self) -> Problem:
        """What was solved; of independent outputs the problem of the first."""
        return self.parts[0].problem

    @cached_property
    def paths(self) -> Paths:
        """The functions of x."""
        if self.later is None:
            return self.exact
        return paths_of([part.paths for part in self.parts])

    @cached_property
    def exact(self) -> Paths:
        """The functions of x as far as means and variances need them."""
        return paths_of([part.paths for part in self.solved])

    @property
    def num_outputs(self) -> int | None:
        """Number of outputs T; None for values without an axis of outputs."""
        return self.exact.num_outputs

    @property
    def num_samples(self) -> int:
        """Number of posterior sample functions, of each output."""
        return self.exact.num_functions

    @property
    def functions(self) -> SampleFunctions:
        """The posterior's own sample functions, x (n', d) -> (num_samples, n', *t)."""
        self._need_samples("functions")
        return SampleFunctions(self.paths, self.solution)

    def __call__(self, x: Points) -> Float[Tensor, "s ..."]:
        """Values of the sample functions; same as ``samples``."""
        return self.samples(x)

    def mean(self, x: Points) -> Float[Tensor, ...]:
        """Posterior mean (n', *t), differentiable in x.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: Shape, dtype, device or values of x do not fit.
        """
        flat, shape = self.exact.flattened(x)
        mean, _ = self.exact.evaluate(flat, deviations=False)
        units = self.exact.units
        return (units.shift + units.scale * mean).reshape(*shape, *mean.shape[1:])

    @overload
    def variance(
        self,
        x: Points,
        *,
        return_error: Literal[False] = False,
        from_samples: bool = False,
    ) -> Tensor: ...

    @overload
    def variance(
        self, x: Points, *, return_error: Literal[True], from_samples: bool = False
    ) -> tuple[Tensor, Tensor]: ...

    def variance(
        self, x: Points, *, return_error: bool = False, from_samples: bool = False
    ) -> Float[Tensor, ...] | tuple[Float[Tensor, ...], Float[Tensor, ...]]:
        """Posterior variance of the function (n', *t), without observation noise.

        Exact up to 2,000 rows of data. With more, what neighbours and smooth
        directions tell of x is taken exactly, and only the rest from the functions
        (see ``sgdgp.posterior.variances``). The first call costs a pass over the
        kernel matrix. Differentiable in x.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.
            return_error: Return standard errors of the variances as well.
            from_samples: The plain variance of the functions instead.

        Returns:
            Variances (n', *t), positive; and their standard errors, zero where exact.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        self._need_samples("variance")
        flat, shape = self.exact.flattened(x)
        if from_samples:
            _, deviations = self.paths.evaluate(flat)
            variance = deviations.square().mean(-1)
            error = (2 / self.num_samples) ** 0.5 * variance
        else:
            _, variance, error = self.exact.moments(flat)
        square = self.exact.units.scale**2
        variance, error = (
            square * part.reshape(*shape, *part.shape[1:]) for part in (variance, error)
        )
        return (variance, error) if return_error else variance

    def samples(self, x: Points) -> Float[Tensor, "s ..."]:
        """Joint samples (num_samples, n', *t): the same functions on every call.

        Args:
            x: Inputs (n', d), or with leading batch dimensions.

        Raises:
            ValueError: There are no samples, or x does not fit.
        """
        return self.functions(x)

    def draw(
        self,
        k: int,
        *,
        seed: int | torch.Generator = 1,
        progress: bool | None = None,
    ) -> SampleFunctions:
        """Draw k new posterior functions; costs a solve with k columns per output.

        Args:
            k: Number of functions.
            seed: Seed or generator of the new prior draws and noise.
            progress: Show a progress bar. Default: as when it was conditioned.

        Returns:
            A callable x (n', d) -> (k, n', *t), differentiable in x. Functions of
            independent outputs are independent from output to output, those of a
            multitask model correlated as the model says.
        """
        check_count("k", k, 1)
        drawn = draw_functions(self.solved, k, generator_of_draws(seed), progress)
        return SampleFunctions(
            paths_of([paths for paths, _ in drawn]),
            merged_solution(
                [solution for _, solution in drawn], groups_of(self.solved)
            ),
        )

    def update(
        self: P,
        x_new: Points,
        y_new: Float[Tensor, " m"] | Float[Tensor, "m t"],
        *,
        noise: Float[Tensor, " m"] | Float[Tensor, "m t"] | float | None = None,
        solver: Solver | str | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
    ) -> P:
        """The posterior given new data as well; this one stays as it is.

        The same prior functions and noise draws are conditioned, so that every sample
        function moves only as far as the new data say, and the solve starts from
        the old weights, corrected around the new points. Hyperparameters stay.

        Args:
            x_new: New inputs (m, d) before the model's own transforms; of a model of
                several inputs all of them.
            y_new: New targets (m,) in the units of the user; of T outputs (m, T). NaN
                where there is none.
            noise: Noise variances of the new targets, in the units of the user squared:
                a number, (m,), or (m, T). Default: the likelihood's; needed where that
                only knows the noise of its training points.
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
        parts = update_parts(
            self.parts,
            x_new,
            y_new,
            noise=noise,
            solver=solver,
            progress=progress,
            callback=callback,
        )
        announce("update", parts)
        return replace(self, solved=parts, later=None)

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
        save(without_recycled(self.parts), path)

    def predict(
        self,
        x: Points,
        *,
        observation_noise: bool | Variances = False,
        batch_size: int | None = None,
        progress: bool | None = None,
    ) -> MultivariateNormal | Marginals:
        """Predictive distribution at x, jointly or point by point.

        Args:
            x: Inputs (n', d), or with leading batch dimensions, whose points are
                joint among themselves alone.
            observation_noise: Add the likelihood's noise; or the noise variances
                themselves, one for all, (n', *t), or of several outputs (n',), needed
                where the likelihood only knows the noise of its training points.
            batch_size: Points at a time. Default: all of them, jointly.
            progress: Show a progress bar over the batches. Default: on a terminal.

        Returns:
            Without ``batch_size`` a GPyTorch ``MultivariateNormal``, of several outputs
            a ``MultitaskMultivariateNormal`` over all points and outputs, with the
            batch dimensions of x. Its variances are those of ``variance``, plus noise;
            its correlations are exact where they are, and else the samples' (rank at
            most ``num_samples``). With it, ``Marginals(mean, variance)`` in memory that
            does not grow with n' beyond the result.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: There are no samples, x or the noise does not fit, or noise is
                asked of a likelihood that does not know it.
        """
        self._need_samples("predict")
        paths = self.exact
        flat, shape = paths.flattened(x)
        noise = self._noise(flat, shape, observation_noise)
        units = paths.units
        if batch_size is None:
            return self._joint(flat, shape, noise)
        check_count("batch_size", batch_size, 1)
        check_followers(progress)
        mean = flat.new_empty(self._shape(flat))
        variance = torch.empty_like(mean)
        batches = list(slices(len(flat), batch_size))
        # Hidden by tqdm itself where the default meets no terminal.
        hidden = None if progress is None else not progress
        with torch.no_grad():
            for rows in tqdm(batches, desc="predict", disable=hidden):
                moments = paths.moments(flat[rows])
                mean[rows] = units.shift + units.scale * moments.mean
                variance[rows] = units.scale**2 * moments.variance
        if noise is not None:
            variance += noise
        return Marginals(*(v.reshape(*shape, *v.shape[1:]) for v in (mean, variance)))

    def _joint(
        self, x: Tensor, shape: torch.Size, noise: Tensor | None
    ) -> MultivariateNormal:
        """The posterior at points x (n, d), which are joint within each batch."""
        together = shape[-1] * (self.num_outputs or 1)
        # Beyond, correlations are those of the functions.
        paths = self.exact if together <= EXACT_ROWS else self.paths
        if len(shape) == 1:
            return paths.joint(x, noise)
        each = [
            paths.joint(rows, own)
            for rows, own in zip(
                x.split(shape[-1]),
                repeat(None) if noise is None else noise.split(shape[-1]),
                strict=False,
            )
        ]
        mean = torch.stack([normal.mean for normal in each])
        covariance = torch.stack([normal.covariance_matrix for normal in each])
        return type(each[0])(
            mean.reshape(*shape, *mean.shape[2:]),
            covariance.reshape(*shape[:-1], together, together),
        )

    def _shape(self, x: Tensor) -> tuple[int, ...]:
        """Shape of values at x (n, d): (n,), or (n, T)."""
        return (len(x),) if self.num_outputs is None else (len(x), self.num_outputs)

    def _noise(
        self, x: Tensor, shape: torch.Size, wanted: bool | Variances
    ) -> Tensor | None:
        """Noise variances of predictions at x (n, d), in the user's shape (..., n')."""
        if not isinstance(wanted, bool):
            if isinstance(wanted, Tensor) and wanted.shape[: len(shape)] == shape:
                wanted = wanted.flatten(0, len(shape) - 1)
            return variances_of("observation_noise", wanted, self._shape(x), x)
        if not wanted:
            return None
        if has_fixed_noise(self.solved[0].problem.prior.model.likelihood):
            raise ValueError(
                "observation_noise: the likelihood only knows the noise of its training"
                f" points; pass the {len(x)} noise variances at x as a tensor "
                f"{self._shape(x)}"
            )
        with torch.no_grad():
            return self.exact.noise(x)

    def _need_samples(self, what: str) -> None:
        if self.num_samples == 0:
            raise ValueError(
                f"{what}: the posterior has no samples (num_samples=0), only a mean; "
                "condition with num_samples >= 1 or use draw"
            )


class PathwisePosterior(Posterior):
    """A posterior of one output: values have the shape (n',)."""


class MultiOutputPosterior(Posterior):
    """A posterior of T outputs, correlated or independent: values are (n', T)."""


def posterior_of(
    parts: Sequence[Part], later: Callable[[], Sequence[Part]] | None = None
) -> Posterior:
    """The posterior made of these parts, one for each output."""
    one = paths_of([part.paths for part in parts]).num_outputs is None
    return (PathwisePosterior if one else MultiOutputPosterior)(tuple(parts), later)


@reads(KIND)
@outside_inference_mode
def load(
    path: str | os.PathLike[str],
    model: ExactGP,
    *,
    solver: Solver | str | None = None,
) -> Posterior:
    """Read a posterior that was saved; it predicts the same numbers.

    Args:
        path: The file.
        model: A model built like the one that was saved: it gives the structure, the
            file the parameters. It is copied and never changed. What a model keeps
            outside its ``state_dict`` comes from it as well.
        solver: Solver of later draws and updates. Default: the one that was saved; a
            solver that is not of this package is not in the file, and "auto" takes
            its place with a warning.

    Returns:
        The posterior, on the model's device, with all of its verbs.

    Raises:
        StorageError: The file is missing, damaged, not a posterior of sgdgp, or of a
            newer format; or the model is built otherwise (a ValueError).
        TypeError: An argument is of the wrong kind.
    """
    place = path_of(path)
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"model: expected a gpytorch.models.ExactGP for {place}, a posterior, "
            f"found {type(model).__name__}"
        )
    if solver is not None and not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    contents = read_values(place, KIND)
    with fitting(place, "model"):
        return posterior_of(parts_from(contents, model, solver))
