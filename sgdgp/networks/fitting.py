"""Learning a linearised network's prior precisions, then drawing its posterior.

Sample-based expectation maximisation (Antoran et al., "Sampling-based inference for
large linear models", ICLR 2023). Each step

1. minimises the loss of the linear model (``linear_model.py``),
2. draws a few posterior samples: (phi^T phi + I) v = theta_0 + phi^T eps,
3. sets alpha <- gamma / |w|^2, and the noise variance of a Gaussian likelihood,

with everything warm-started and the same theta_0 and eps in every step, so that the
precisions converge instead of wandering. At the end many samples are drawn once.

Deviations from the paper:

1. The likelihood's Hessian is that at the linear model's outputs, as the generalised
   linear model has it; at the network's own it nearly vanishes wherever the network
   fits its training data, and the posterior stays at the prior.
2. Everything is in whitened weights v = R^-1 w, so that every prior is the same code.
3. The first precision is the largest eigenvalue of the curvature: too large mostly,
   which makes the first systems easy ones.
4. gamma is v^T (phi^T phi) v, which the solver's residual already holds: no pass more.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.expectation_maximisation import (
    EffectiveDimension,
    effective_dimension,
)
from sgdgp.networks.first_state import prior_draws
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.linear_model import LinearOptimum, optimise
from sgdgp.networks.run_state import (
    CurvatureAt,
    EMStep,
    RunState,
    Schedule,
    noise_in_use,
    warn_once,
)
from sgdgp.networks.weight_priors import WeightPrior
from sgdgp.networks.weight_solvers import WeightSolution, WeightSolver
from sgdgp.solvers.base import Callback, Progress

_LIVE_COLUMNS = 12


class Interrupted(Exception):
    """A callback asked to stop."""


class Run:
    """One fit: its data, its settings, and what it has found so far.

    Args:
        data: The data set seen through the tangent model.
        curvature_at: Where the Hessian of the samples is taken.
        schedule: How much to do.
        state: From :func:`start`, or a checkpoint.
        callback: Told of the solver's advance, in relative errors; True stops.
    """

    def __init__(
        self,
        data: TangentData,
        curvature_at: CurvatureAt,
        schedule: Schedule,
        state: RunState,
        callback: Callback | None,
    ) -> None:
        self.data = data
        self.state = state
        self._schedule = schedule
        self._callback = callback
        self._started = time.perf_counter() - state.seconds
        self._network_outputs = (
            data.network_outputs() if curvature_at == "network" else None
        )
        if self._network_outputs is not None:
            state.passes += 1.0

    @property
    def seconds(self) -> float:
        """Wall time, earlier runs of a checkpoint included."""
        return time.perf_counter() - self._started

    def stages(self) -> Iterator[RunState]:
        """The whole fit; yields wherever it could go on from.

        Raises:
            Interrupted: The callback asked for it. The state is good.
        """
        state = self.state
        while state.step < self._schedule.steps and not state.is_learned:
            self._learn()
            yield state
        state.is_learned = True
        while state.finished < self._schedule.final_samples:
            yield from self._draw()

    def _optimum(self) -> LinearOptimum:
        state = self.state
        optimum = optimise(
            self.data,
            state.prior,
            state.likelihood,
            state.mean,
            self._schedule.solver,
            seed=self._schedule.seed,
            watch=self._watch,
        )
        state.passes += optimum.passes
        state.mean = optimum.mean
        if not optimum.converged and not self._asked:
            warn_once(
                state,
                f"The linear model's mean has not converged after {optimum.passes:.0f} "
                "passes: give the solver more passes (max_passes), or a larger "
                "precision to start from.",
            )
        return optimum

    def _curvature(self, optimum: LinearOptimum) -> WeightSystem:
        if self._network_outputs is None:
            return optimum.system
        return optimum.system.at(self._network_outputs)

    def _solve(
        self, system: WeightSystem, columns: range, initial: Tensor
    ) -> tuple[WeightSolution, Tensor]:
        """Posterior samples of these numbers, and the right-hand sides they solve."""
        seed = self._schedule.seed
        rhs = system.noise(columns, seed) + prior_draws(initial, columns, seed)
        self.state.passes += 1.0
        solution = self._schedule.solver.solve(
            system, rhs, initial, seed=seed, watch=self._watch
        )
        self.state.passes += solution.passes
        return solution, rhs

    def _learn(self) -> None:
        state, schedule = self.state, self._schedule
        optimum = self._optimum()
        self._stop_if_asked()
        system = self._curvature(optimum)
        solution, rhs = self._solve(system, range(schedule.num_samples), state.samples)
        self._stop_if_asked()
        prior, samples = state.prior, solution.weights
        products = prior.group_sums(samples, solution.images(rhs))
        gamma = effective_dimension(products, prior.group_sizes)
        squares = prior.group_sums(state.mean, state.mean)[:, 0]
        likelihood = self._learned_noise(optimum, gamma, samples)
        entry = EMStep(
            precisions=tuple(prior.precisions.tolist()),
            effective_dimension=tuple(gamma.groups.tolist()),
            standard_error=gamma.standard_error,
            noise=noise_in_use(state.likelihood),
            loss=optimum.loss,
            errors=tuple(solution.errors.tolist()),
            passes=state.passes,
            seconds=self.seconds,
        )
        # Only now does the state move: an interrupt finds it before the step or after.
        quiet = _is_near(likelihood, state.likelihood)
        state.prior = prior.with_precisions(
            state.update(prior.precisions, gamma.groups, squares)
        )
        # The mean keeps its weights w = R v, in the coordinates of the new R. Samples
        # keep v: in all directions that the data do not see it is the prior draw.
        state.mean = rewhitened(state.mean, prior, state.prior)
        state.samples = samples
        state.likelihood = likelihood
        state.history.append(entry)
        state.step += 1
        state.is_learned = state.update.has_settled and quiet
        state.seconds = self.seconds
        _warn(state, solution, schedule.solver, f"step {state.step}")

    def _learned_noise(
        self, optimum: LinearOptimum, gamma: EffectiveDimension, samples: Tensor
    ) -> Likelihood:
        """The likelihood with the noise that this step learns, if it learns one."""
        state = self.state
        likelihood = state.likelihood
        if not isinstance(likelihood, Gaussian) or not likelihood.learns_noise:
            return likelihood
        errors = likelihood.squared_error(optimum.system.outputs, self.data.targets)
        errors = self.data.total(errors)
        dimension: float | Tensor = gamma.total
        if likelihood.per_output:
            fluctuations = self.data.forward(state.prior.root(samples))
            squares = self.data.total(fluctuations.double().square().mean(2).sum(0))
            dimension = squares / squares.new_tensor(likelihood.variance)
            state.passes += 1.0
        return likelihood.update_noise(errors, self.data.stream.num_examples, dimension)

    def _draw(self) -> Iterator[RunState]:
        """The samples of the posterior, some columns at a time."""
        state, schedule = self.state, self._schedule
        system = self._curvature(self._optimum())
        self._stop_if_asked()
        total = schedule.final_samples
        have = state.samples[:, :total]
        missing = range(have.shape[1], total)
        fresh = prior_draws(have, missing, schedule.seed)
        state.samples = torch.cat([have.mT, fresh.mT]).mT
        while state.finished < total:
            stop = min(total, state.finished + schedule.columns)
            columns = range(state.finished, stop)
            part = slice(state.finished, stop)
            solution, _ = self._solve(system, columns, state.samples[:, part])
            state.samples[:, part] = solution.weights
            self._stop_if_asked()
            _warn(state, solution, schedule.solver, "the posterior samples")
            state.finished = stop
            state.seconds = self.seconds
            yield state

    def _watch(self, passes: float, errors: Tensor, weights: object) -> bool:
        if self._callback is None:
            return False
        progress = Progress(
            self.state.passes + passes,
            self.seconds,
            errors,
            exact=False,
            weights=weights,  # type: ignore[arg-type]
        )
        self._asked = bool(self._callback(progress))
        return self._asked

    _asked = False

    def _stop_if_asked(self) -> None:
        if self._asked:
            raise Interrupted


def rewhitened(
    v: Float[Tensor, "D k"], old: WeightPrior, new: WeightPrior
) -> Float[Tensor, "D k"]:
    """R_new^-1 R_old v, for priors that differ in their precisions only."""
    factors = (new.precisions / old.precisions).sqrt()
    out = v.mT.clone()
    for group, number in zip(new.groups, new.group_of, strict=True):
        out[:, group] *= factors[number]
    return out.mT


def _is_near(one: Likelihood, other: Likelihood) -> bool:
    """Whether noise variances differ by less than 5 %; other likelihoods have none."""
    if not isinstance(one, Gaussian) or not isinstance(other, Gaussian):
        return True
    ratio = torch.as_tensor(one.variance).double() / torch.as_tensor(other.variance)
    return bool((ratio.log().abs() < 0.05).all())


def columns_within(budget: int, num_weights: int, element_size: int) -> int:
    """How many columns a solver can work on together within a memory budget."""
    return max(1, min(64, budget // (_LIVE_COLUMNS * num_weights * element_size)))


def _warn(
    state: RunState, solution: WeightSolution, solver: WeightSolver, where: str
) -> None:
    if solution.reason in ("converged", "interrupted"):
        return
    warn_once(
        state,
        f"{type(solver).__name__} stopped ({solution.reason}) at {where} with a "
        f"relative error of up to {float(solution.errors.max()):.2e}, the tolerance "
        f"is {solver.tolerance:g}: give it more passes (max_passes) or a larger "
        "tolerance.",
    )
