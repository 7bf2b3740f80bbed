"""From a trained network to a posterior over its functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from sgdgp.core.checkpoint import check_every
from sgdgp.core.checks import check_count, check_followers, check_positive
from sgdgp.core.deprecation import renamed_arguments
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import generator_of, seed_of
from sgdgp.networks.curvature import TangentData
from sgdgp.networks.dual import Dual
from sgdgp.networks.fitting import (
    CurvatureAt,
    Interrupted,
    Mean,
    Run,
    RunState,
    Schedule,
    most_evident,
)
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.priors import GPrior, PriorSettings
from sgdgp.networks.storage import RunKeeper
from sgdgp.networks.stream import Split, stream_of
from sgdgp.networks.weight_solvers import (
    WeightCG,
    WeightCholesky,
    WeightKronecker,
    WeightSGD,
    WeightSolver,
)
from sgdgp.solvers.base import Callback, progress_bar
from sgdgp.tangent import Tangent, Weights

STREAMED_FROM = 200_000
"""From so many examples "auto" is stochastic gradient descent: a single epoch of it has
more steps than CG needs passes."""

_LIVE_COLUMNS = 12
"""Blocks (D, k) that a solve is granted: a solver's own half dozen, and as many
temporaries of a pass."""

_MOST_COLUMNS = 64
"""Columns of one solve: more share a pass, but making k of them orthonormal costs a
block recurrence k^2 D."""

_SOLVERS: dict[str, Callable[[], WeightSolver]] = {
    "cholesky": WeightCholesky,
    "cg": WeightCG,
    "sgd": WeightSGD,
    "dual": Dual,
    "kronecker": WeightKronecker,
}


def linearise(
    network: nn.Module,
    likelihood: Likelihood,
    prior: PriorSettings | None = None,
    *,
    weights: Weights = None,
    output: Callable[[Any], Tensor] | None = None,
    curvature_at: CurvatureAt = "linear",
    mean: Mean | None = None,
    offset: bool = False,
    memory_budget: int | None = None,
) -> LinearisedNetwork:
    """Take a trained network as a linear model in its weights.

    Args:
        network: Any trained ``torch.nn.Module`` in evaluation mode. It is read, never
            changed or copied, and has to stay as it is; buffers are constants.
        likelihood: ``Categorical()``, ``Bernoulli()`` or ``Gaussian(noise=...)``; for
            several labels an example, some without, ``Categorical(ignore_index=-100)``.
        prior: ``GPrior()`` (default), ``Isotropic()``, ``Layerwise()``,
            ``Kronecker()``, a ``LearnedPrior`` of another task, or a precision of
            ``sgdgp.networks.priors`` itself, whose scale is learned.
        weights: Which weights are uncertain: None or "all", "last_layer", "no_norms",
            patterns such as "layer4.*", or a function of name and parameter.
        output: Takes what the network returns to a tensor (b, ...).
        curvature_at: Outputs at which the likelihood's Hessian is taken: those of the
            "linear" model, or of the "network" as in Antoran et al. (2023).
        mean: Whose outputs the posterior's mean is: the "network"'s, or the "linear"
            model's. A regression's noise is learned for it. Default: the network's
            for classes; for regression that with the larger evidence; with a
            ``LearnedPrior`` the linear model's.
        offset: Whether the linear model is f(x) + J(x) (w - theta), the expansion at
            the trained weights theta, in place of J(x) w. Where f = J theta they are
            the same, as in the weights of a last layer; not behind a sigmoid, where J
            vanishes and f does not. A ``LearnedPrior`` has it anyway.
        memory_budget: Bytes for temporaries. Default: half of what is free.

    Returns:
        The linearised network; ``fit`` it to the data that trained it.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The network cannot be linearised; names the layer in the way.

    Example:
        >>> posterior = sgdgp.networks.linearise(network, Categorical()).fit(loader)
        >>> posterior.predict(x)
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            "likelihood: expected Categorical(), Bernoulli() or Gaussian(), found "
            f"{_what(likelihood)}"
        )
    prior = GPrior() if prior is None else prior
    if not isinstance(prior, PriorSettings):
        raise TypeError(
            "prior: expected GPrior(), Isotropic(), Layerwise(), Kronecker() or a "
            f"LearnedPrior, found {_what(prior)}"
        )
    if curvature_at not in get_args(CurvatureAt):
        raise ValueError(
            f'curvature_at: expected "linear" or "network", found {curvature_at!r}'
        )
    if mean is not None and mean not in get_args(Mean):
        raise ValueError(f'mean: expected "network", "linear" or None, found {mean!r}')
    tangent = Tangent(
        network, weights=weights, output=output, memory_budget=memory_budget
    )
    return LinearisedNetwork(tangent, likelihood, prior, curvature_at, mean, offset)


linearize = linearise
"""The same in US spelling."""


@dataclass(frozen=True)
class LinearisedNetwork:
    """A network as a linear model in its weights, before it has seen data.

    Attributes:
        tangent: Its Jacobian.
        likelihood: Of the targets given the outputs.
        prior: Settings of the weights' prior.
        curvature_at: Outputs at which the likelihood's Hessian is taken.
        mean: Whose outputs the posterior's mean is; None: what the evidence chooses.
        offset: Whether the linear model keeps f(x) - J(x) theta, its value at zero.
    """

    tangent: Tangent
    likelihood: Likelihood
    prior: PriorSettings
    curvature_at: CurvatureAt
    mean: Mean | None = None
    offset: bool = False

    @renamed_arguments(every="checkpoint_every")
    def fit(
        self,
        loader: Any,
        *,
        num_samples: int = 8,
        final_samples: int = 64,
        steps: int = 40,
        precision: float | None = None,
        solver: WeightSolver | str = "auto",
        seed: int | torch.Generator = 0,
        split: Split | None = None,
        progress: bool | None = None,
        callback: Callback | None = None,
        checkpoint: str | os.PathLike[str] | None = None,
        checkpoint_every: int | float = 60,
    ) -> LinearisedPosterior:
        """Learn the prior precision (and noise), and draw posterior weights.

        In a group of processes (torchrun) every process calls this with the same
        loader; each passes over its share of the data.

        Args:
            loader: A ``DataLoader``, a ``Dataset``, or a collection of batches (inputs,
                targets): the training data without augmentation. Order and
                ``drop_last`` of a DataLoader do not matter: every example is used.
            num_samples: Samples that learn the precision.
            final_samples: Samples of the posterior.
            steps: Most steps of expectation maximisation: it ends when it settles, and
                warns otherwise. With 0, ``precision`` is kept.
            precision: Prior precision to start from. Default: the largest eigenvalue
                of the curvature.
            solver: ``WeightCholesky()``, ``WeightCG()``, ``WeightSGD()``,
                ``Dual(...)``, ``WeightKronecker()``, or "auto": Cholesky for few
                weights or few examples, else CG, and SGD from 200,000 examples.
            seed: Seed or generator of everything random.
            split: From what the loader yields to (inputs, targets).
            progress: Show a progress bar. Default: on a terminal.
            callback: Called as the solves advance, with relative errors in place of
                residuals; returning True stops the fit.
            checkpoint: File that keeps the fit. Calling again after the process was
                killed goes on from there.
            checkpoint_every: Seconds between two writes of the checkpoint, at least.

        Returns:
            The posterior. ``posterior.reason`` says whether the fit was interrupted,
            ``posterior.history`` how the precision was learned.

        Raises:
            TypeError: Data or settings are of the wrong kind.
            ValueError: Data or settings do not fit; says which and why.
        """
        check_followers(progress, callback)
        check_every(checkpoint_every)
        check_count("num_samples", num_samples, 2)
        check_count("final_samples", final_samples, 2)
        check_count("steps", steps, 0)
        if precision is not None:
            check_positive("precision", precision)
        elif steps == 0:
            raise ValueError("precision: needed where steps=0 leaves it as it is")
        tangent = self.tangent
        stream = stream_of(loader, tangent.device, split)
        centre = self.prior.centre(tangent)
        mean = self._mean(centre)
        if centre is None and self.offset:
            centre = -tangent.theta  # the prior's mean is zero
        data = TangentData(tangent, stream, self.likelihood, centre)
        budget = resolve_budget(tangent.memory_budget, tangent.device)
        column = tangent.num_weights * tangent.dtype.itemsize
        schedule = Schedule(
            num_samples=num_samples,
            final_samples=final_samples,
            steps=steps,
            precision=precision,
            solver=chosen_solver(solver, data, self.likelihood),
            seed=seed_of(generator_of(seed)),
            columns=max(1, min(_MOST_COLUMNS, budget // (_LIVE_COLUMNS * column))),
            curvature_at=self.curvature_at,
            mean=mean,
        )
        keeper, state = None, None
        if checkpoint is not None:
            keeper = RunKeeper(
                checkpoint, checkpoint_every, tangent, self._identity(schedule, data)
            )
            state = keeper.load()
        candidates, reason = self.prior.candidates(), "finished"
        with progress_bar(progress, "linearised Laplace", callback) as listener:
            if state is None:
                state, reason = most_evident(
                    data, self.likelihood, candidates, schedule, listener
                )
            run, is_chosen = Run(data, schedule, state, listener), reason == "finished"
            try:
                for reached in run.stages() if is_chosen else ():
                    if keeper is not None:
                        keeper.keep(reached)
            except Interrupted:
                reason = "interrupted"
            finally:
                if keeper is not None and is_chosen:
                    keeper.keep(run.state, now=True)
        if keeper is not None and keeper.problem is not None:
            run.state.warnings.append(keeper.problem)
        settings = candidates[run.state.candidate]
        return posterior_of(data, run.state, reason, settings, self.curvature_at)

    def _mean(self, centre: Tensor | None) -> Mean | None:
        if self.mean is not None or centre is not None:
            # The network at the mean of a learned prior has not seen these data.
            return self.mean or "linear"
        return None if isinstance(self.likelihood, Gaussian) else "network"

    def _identity(self, schedule: Schedule, data: TangentData) -> dict[str, object]:
        """What makes two fits the same one, by the names that users know."""
        # Reading the targets is a pass over the data, which leaves the mark.
        device = data.targets.device
        mark = torch.tensor([data.stream.mark], dtype=torch.float64, device=device)
        mark = data.total(mark)
        chosen: dict[str, object] = {} if self.mean is None else {"mean": self.mean}
        if self.offset:
            chosen["offset"] = True
        return {
            **chosen,
            "likelihood": self.likelihood,
            "prior": self.prior.identity(),
            "curvature_at": self.curvature_at,
            "num_samples": schedule.num_samples,
            "steps": schedule.steps,
            "precision": schedule.precision,
            "seed": schedule.seed,
            "number of examples": data.stream.num_examples,
            "data": f"{float(mark[0]):.8g}",
        }


def chosen_solver(
    solver: WeightSolver | str, data: TangentData, likelihood: Likelihood
) -> WeightSolver:
    """The solver itself, that of a name, or what "auto" stands for.

    Raises:
        TypeError: Neither a solver nor a name.
        ValueError: No solver has that name.
    """
    if isinstance(solver, WeightSolver):
        return solver
    if not isinstance(solver, str):
        raise TypeError(
            "solver: expected WeightCholesky(), WeightCG(), WeightSGD(), Dual(), "
            f"WeightKronecker() or a name, found {_what(solver)}"
        )
    if solver == "auto":
        if data.has_cheap_gram(likelihood):
            return WeightCholesky()
        return WeightCG() if data.stream.num_examples < STREAMED_FROM else WeightSGD()
    if solver not in _SOLVERS:
        names = ", ".join(f'"{name}"' for name in ("auto", *_SOLVERS))
        raise ValueError(f"solver: expected {names} or a solver, found {solver!r}")
    return _SOLVERS[solver]()


def _what(found: object) -> str:
    """What an argument is; a class was meant to be called."""
    if isinstance(found, type):
        return f"the class {found.__name__}: call it, {found.__name__}()"
    return type(found).__name__


def posterior_of(
    data: TangentData,
    state: RunState,
    reason: str,
    settings: PriorSettings,
    curvature_at: CurvatureAt,
) -> LinearisedPosterior:
    """What a run has found, in weights."""
    warnings = list(state.warnings)
    if reason == "interrupted":
        warnings.append(
            "The fit was interrupted: "
            + (
                f"{state.finished} samples are final."
                if state.is_learned
                else "the precision is not learned and the samples are not final."
            )
        )
    # A posterior lives longer than a fit, and only a prior made of it passes again.
    data.stream.forget()
    samples = state.samples
    if 0 < state.finished < samples.shape[1]:
        samples = samples[:, : state.finished]
    return LinearisedPosterior(
        tangent=data.tangent,
        likelihood=state.likelihood,
        prior=state.prior,
        weight_samples=state.prior.root(samples),
        weight_mean=state.prior.root(state.mean),
        num_examples=data.stream.num_examples,
        mean_of=state.mean_of or "linear",
        reason=reason,
        history=tuple(state.history),
        passes=state.passes,
        seconds=state.seconds,
        warnings=tuple(warnings),
        curvature_at=curvature_at,
        centre=data.centre,
        settings=settings,
        stream=data.stream,
    )
