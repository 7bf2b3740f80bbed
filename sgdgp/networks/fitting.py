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

import functools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import warn_user
from sgdgp.networks.curvature import (
    TangentData,
    WeightSystem,
    curvature_probes,
    largest_eigenvalue,
)
from sgdgp.networks.evidence import (
    Evidence,
    Spectrum,
    linear_evidence,
    network_evidence,
    spectrum_of,
)
from sgdgp.networks.expectation_maximisation import (
    EffectiveDimension,
    EMStep,
    PrecisionUpdate,
)
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.linear_model import LinearOptimum, optimise
from sgdgp.networks.priors import PriorSettings, WeightPrior
from sgdgp.networks.weight_solvers import WeightSolution, WeightSolver, prior_draws
from sgdgp.solvers.base import Callback, Progress

CurvatureAt: TypeAlias = Literal["linear", "network"]
"""Outputs at which the likelihood's Hessian is taken."""

Mean: TypeAlias = Literal["network", "linear"]
"""Whose outputs the posterior's mean is."""

_POWER_STEPS = 5
"""Power iterations for the first precision. It has to be of the right size only:
learning moves it by factors."""

_LEAST_NOISE = 1e-4
"""The first noise variance over the variance of the targets, at least: a network that
fits its data exactly would make the first systems unsolvable."""

_LARGEST_RISE = 3.0
"""Factor by which the noise variance rises at most in one step beyond the variance of
the targets."""

_SAME_EVIDENCE = 1.0
"""Nats: odds of less than three to one are no evidence against a prior."""

_SETTLED_NOISE = 0.05
"""Change of the log noise variance that ends learning, about that of the precision."""


@dataclass(frozen=True)
class Schedule:
    """How much is done.

    Attributes other than these are arguments of ``LinearisedNetwork.fit``.

    Attributes:
        columns: Most samples solved for together.
        curvature_at: Where the Hessian of the samples is taken.
        mean: Of the posterior; None leaves that of a regression to the evidence.
    """

    num_samples: int
    final_samples: int
    steps: int
    precision: float | None
    solver: WeightSolver
    seed: int
    columns: int
    curvature_at: CurvatureAt
    mean: Mean | None = None


@register_stored_class
@dataclass
class RunState:
    """What a run knows between two stages; all that a checkpoint has to hold.

    Attributes:
        prior: With the precisions as they are.
        likelihood: With the noise as it is.
        mean: vbar, whitened (D, 1).
        samples: v, whitened (D, k).
        step: Steps of expectation maximisation that are done.
        is_learned: Whether learning has ended.
        finished: Columns of ``samples`` that are final.
        update: The damping so far.
        history: One entry a step.
        passes: Passes over the data so far.
        seconds: Wall time so far.
        warnings: Sentences a user can act on.
        mean_of: Whose outputs the posterior's mean is, None until that is chosen.
        candidate: Which of several settings the prior is of.
    """

    prior: WeightPrior
    likelihood: Likelihood
    mean: Float[Tensor, "D 1"]
    samples: Float[Tensor, "D k"]
    step: int = 0
    is_learned: bool = False
    finished: int = 0
    update: PrecisionUpdate = field(default_factory=PrecisionUpdate)
    history: list[EMStep] = field(default_factory=list)
    passes: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    mean_of: Mean | None = "network"
    candidate: int = 0

    def warn(self, sentence: str) -> None:
        """Keep the last sentence of each kind only."""
        kind = sentence.split(maxsplit=3)[:3]
        others = [kept for kept in self.warnings if kept.split(maxsplit=3)[:3] != kind]
        self.warnings = [*others, sentence]


class Interrupted(Exception):
    """A callback asked to stop."""


@dataclass
class Run:
    """One fit: its data, its settings, and what it has found so far.

    Attributes:
        data: The data set seen through the tangent model.
        schedule: How much to do.
        state: From :func:`start`, or a checkpoint.
        callback: Told of the solver's advance, in relative errors; True stops.
    """

    data: TangentData
    schedule: Schedule
    state: RunState
    callback: Callback | None

    def __post_init__(self) -> None:
        self._asked_to_stop = False
        self._started = time.perf_counter() - self.state.seconds

    @functools.cached_property
    def _network_outputs(self) -> Tensor:
        self.state.passes += 1.0
        return self.data.network_outputs

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
        yield from self._steps(self.schedule.steps)
        if state.mean_of is None:
            state.mean_of = self._more_evident()
            if state.mean_of == "network":
                # Its noise is another one, and so is all that depends on it.
                state.is_learned, state.update = False, PrecisionUpdate()
            yield state
        if self.schedule.mean is None and state.mean_of == "network":
            yield from self._steps(2 * self.schedule.steps)
        if state.step and not state.is_learned:
            warn_user(
                f"Learning has not settled after {state.step} steps: precision "
                f"{_in_words(state.prior.precisions.tolist())}, noise "
                f"{_in_words(state.likelihood.variance)} may be far off; allow more "
                "(steps)."
            )
        state.is_learned = True
        while state.finished < self.schedule.final_samples:
            yield from self._draw()

    def _steps(self, last: int) -> Iterator[RunState]:
        while self.state.step < last and not self.state.is_learned:
            self._learn()
            yield self.state

    def learn(self) -> Evidence:
        """Learn as ``stages`` does, and no more; the evidence of what is found.

        Raises:
            Interrupted: The callback asked for it.
        """
        for _ in self._steps(self.schedule.steps):
            pass
        optimum, spectrum = self._spectrum()
        return linear_evidence(optimum.mean, optimum.loss, spectrum)

    def _spectrum(self) -> tuple[LinearOptimum, Spectrum]:
        optimum = self._optimum()
        self._stop_if_asked()
        spectrum = spectrum_of(
            optimum.system, self.schedule.num_samples, self.schedule.seed
        )
        self.state.passes += spectrum.passes
        return optimum, spectrum

    def _more_evident(self) -> Mean:
        """The mean that the evidence speaks for, with what has been learned."""
        optimum, spectrum = self._spectrum()
        linear = linear_evidence(optimum.mean, optimum.loss, spectrum).value
        outputs, theta = self._network_outputs, self.data.tangent.theta
        network = network_evidence(optimum.system, theta, outputs, spectrum)
        return "linear" if linear >= network else "network"

    def _optimum(self) -> LinearOptimum:
        state = self.state
        optimum = optimise(
            self.data,
            state.prior,
            state.likelihood,
            state.mean,
            self.schedule.solver,
            seed=self.schedule.seed,
            callback=self._tell,
        )
        state.passes += optimum.passes
        state.mean = optimum.mean
        if not optimum.converged and not self._asked_to_stop:
            state.warn(
                f"The linear model's mean has not converged after {optimum.passes:.0f} "
                "passes: give the solver more passes (max_passes), or a larger "
                "precision to start from.",
            )
        return optimum

    def _curvature(self, optimum: LinearOptimum) -> WeightSystem:
        if self.schedule.curvature_at == "linear":
            return optimum.system
        return optimum.system.at(self._network_outputs)

    def _solve(
        self, system: WeightSystem, columns: range, initial: Tensor
    ) -> WeightSolution:
        """Posterior samples of these numbers."""
        self.state.passes += 1.0
        solution = self.schedule.solver.draw(
            system, columns, initial, seed=self.schedule.seed, callback=self._tell
        )
        self.state.passes += solution.passes
        return solution

    def _learn(self) -> None:
        state, schedule = self.state, self.schedule
        optimum = self._optimum()
        self._stop_if_asked()
        system = self._curvature(optimum)
        prior, samples, errors = state.prior, state.samples, ()
        gamma = self._exact_dimension(system)
        if gamma is None or _learns_by_output(state.likelihood):
            solution = self._solve(system, range(schedule.num_samples), samples)
            self._stop_if_asked()
            samples, errors = solution.weights, tuple(solution.errors.tolist())
            gamma = gamma or solution.dimension()
            self._warn_unless_solved(solution, f"step {state.step + 1}")
        squares = prior.group_sums(state.mean, state.mean)[:, 0]
        likelihood = self._learned_noise(optimum, gamma, samples)
        entry = EMStep(
            precisions=tuple(prior.precisions.tolist()),
            effective_dimension=tuple(gamma.groups.tolist()),
            standard_error=gamma.standard_error,
            noise=state.likelihood.variance,
            loss=optimum.loss,
            errors=errors,
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
        state.mean = state.prior.rewhiten(state.mean, prior)
        state.samples = samples
        state.likelihood = likelihood
        state.history.append(entry)
        state.step += 1
        state.is_learned = state.update.has_settled and quiet
        state.seconds = self.seconds

    def _exact_dimension(self, system: WeightSystem) -> EffectiveDimension | None:
        """How many weights the data determine, where the solver needs no samples."""
        is_formed = system.is_formed
        found = self.schedule.solver.dimension(system, self.schedule.seed)
        self.state.passes += 0.0 if is_formed or found is None else 1.0
        return found

    def _learned_noise(
        self, optimum: LinearOptimum, gamma: EffectiveDimension, samples: Tensor
    ) -> Likelihood:
        """The likelihood with the noise that this step learns, if it learns one."""
        state = self.state
        likelihood = state.likelihood
        if not isinstance(likelihood, Gaussian) or not likelihood.learns_noise:
            return likelihood
        outputs = optimum.system.outputs
        if state.mean_of == "network":
            outputs = self._network_outputs
        errors = likelihood.squared_error(outputs, self.data.targets)
        errors = self.data.total(errors)
        dimension: float | Tensor = gamma.total
        if _learns_by_output(likelihood):
            fluctuations = self.data.forward(state.prior.root(samples))
            squares = self.data.total(fluctuations.double().square().mean(2).sum(0))
            dimension = squares / squares.new_tensor(likelihood.variance)
            state.passes += 1.0
        found = likelihood.update_noise(
            errors, self.data.stream.num_examples, dimension
        )
        # A precision that is still too large leaves the targets' mean as an error, and
        # with so much noise there is nothing to learn a precision from.
        spread = self.data.target_variance.cpu()
        if not likelihood.per_output:
            spread = spread.mean()
        most = spread.maximum(_LARGEST_RISE * _numbers(likelihood))
        return found.with_noise(_numbers(found).minimum(most))

    def _draw(self) -> Iterator[RunState]:
        """The samples of the posterior, some columns at a time."""
        state, schedule = self.state, self.schedule
        system = self._curvature(self._optimum())
        self._stop_if_asked()
        total = schedule.final_samples
        have = state.samples[:, :total]
        missing = range(have.shape[1], total)
        fresh = prior_draws(have, missing, schedule.seed)
        state.samples = torch.cat([have.mT, fresh.mT]).mT
        while state.finished < total:
            stop = min(total, state.finished + schedule.columns)
            initial = state.samples[:, state.finished : stop]
            solution = self._solve(system, range(state.finished, stop), initial)
            state.samples[:, state.finished : stop] = solution.weights
            self._stop_if_asked()
            self._warn_unless_solved(solution, "the posterior samples")
            state.finished = stop
            state.seconds = self.seconds
            yield state

    def _warn_unless_solved(self, solution: WeightSolution, where: str) -> None:
        if solution.reason in ("converged", "interrupted"):
            return
        solver = self.schedule.solver
        self.state.warn(
            f"{type(solver).__name__} stopped ({solution.reason}) at {where} with a "
            f"relative error of up to {float(solution.errors.max()):.2e}, the "
            f"tolerance is {solver.tolerance:g}: give it more passes (max_passes) or a "
            "larger tolerance."
        )

    def _tell(self, progress: Progress) -> bool:
        """Tell the callback of a solve; whether it asks to stop."""
        if self.callback is None:
            return False
        whole = replace(
            progress,
            passes=self.state.passes + progress.passes,
            seconds=self.seconds,
        )
        # Once is enough: a solve may tell of more before it is over.
        self._asked_to_stop |= bool(self.callback(whole))
        return self._asked_to_stop

    def _stop_if_asked(self) -> None:
        if self._asked_to_stop:
            raise Interrupted


def start(
    data: TangentData,
    likelihood: Likelihood,
    settings: PriorSettings,
    schedule: Schedule,
) -> RunState:
    """The state before the first step: prior, noise and precision to start from."""
    passes = 2.0
    outputs = data.network_outputs
    likelihood.check_targets(data.targets, outputs.shape[1])
    likelihood = likelihood.with_targets(data.targets, outputs.shape[1])
    if isinstance(likelihood, Gaussian) and likelihood.learns_noise:
        # A learned prior's mean has its own outputs; an offset's are of no weights.
        is_learned = settings.centre(data.tangent) is not None
        at = data.offset if is_learned and data.offset is not None else outputs
        likelihood = first_noise(data, likelihood, at)
    if data.offset is not None:
        outputs = data.offset
    elif schedule.curvature_at == "linear":
        outputs = torch.zeros_like(outputs)
    seed = schedule.seed
    prior = settings.build(
        data.tangent,
        lambda count: curvature_probes(data, likelihood, outputs, count, seed),
    )
    system = WeightSystem(data, prior, likelihood, outputs)
    precision = schedule.precision
    if precision is None:
        noise = system.noise(range(1), seed)
        precision = largest_eigenvalue(system.product, noise, _POWER_STEPS)
        passes += 1.0 + _POWER_STEPS
        if not 0 < precision < float("inf"):
            raise ValueError(
                "network: its Jacobian in the chosen weights is zero or not finite on "
                f"the training data (largest eigenvalue of the curvature: {precision})"
            )
    prior = prior.with_precisions(torch.full_like(prior.precisions, precision))
    mean = data.zeros(1)
    samples = prior_draws(mean, range(schedule.num_samples), seed)
    if data.centre is not None and schedule.precision is not None:
        # The network's own weights have its outputs, which the mean's are close to.
        # Where the first precision is the largest eigenvalue, it is close to zero.
        mean = prior.whiten(-data.centre)
    return RunState(
        prior, likelihood, mean, samples, passes=passes, mean_of=schedule.mean
    )


def most_evident(
    data: TangentData,
    likelihood: Likelihood,
    candidates: Sequence[PriorSettings],
    schedule: Schedule,
    callback: Callback | None,
) -> tuple[RunState, str]:
    """The state that a fit starts from, of several priors that the evidence speaks for.

    Args:
        data: The data set.
        likelihood: Of the targets.
        candidates: Priors, the one to prefer last; one alone is taken as it is.
        schedule: How each of several learns its precision, to be judged by.
        callback: As of ``Run``.

    Returns:
        That of the last candidate against which there is no evidence, and "finished"
        or "interrupted".

    Raises:
        ValueError: No evidence is finite.
    """
    if len(candidates) == 1:
        return start(data, likelihood, candidates[0], schedule), "finished"
    evidence: list[float] = []
    passes = 0.0
    for settings in candidates:
        state = start(data, likelihood, settings, schedule)
        state.candidate = len(evidence)
        state.passes += passes
        try:
            # Probes are the same for all, and so their errors are much the same.
            found = Run(data, schedule, state, callback).learn().value
        except Interrupted:
            return state, "interrupted"
        evidence.append(found if math.isfinite(found) else -math.inf)
        passes = state.passes
    best = max(evidence)
    if best == -math.inf:
        raise ValueError(
            f"prior: the evidence is not finite for any of {len(candidates)} priors to "
            "choose from; use float64, or a strength of your own"
        )
    chosen = max(i for i, each in enumerate(evidence) if each >= best - _SAME_EVIDENCE)
    data.stream.processes.check_agree("prior: number of the chosen one", chosen)
    state = start(data, likelihood, candidates[chosen], schedule)
    state.candidate = chosen
    state.passes += passes
    return state, "finished"


def first_noise(
    data: TangentData, likelihood: Gaussian, outputs: Float[Tensor, "r C"]
) -> Gaussian:
    """The noise that outputs leave, not too small beside the targets' own.

    Raises:
        ValueError: They leave none, and the targets are all the same.
    """
    count = data.stream.num_examples
    errors = data.total(likelihood.squared_error(outputs, data.targets))
    squares = count * data.target_variance
    if not bool((squares + errors).any()):
        raise ValueError(
            "loader: all targets are the same and the network's own, so there is no "
            "noise to learn; give it as Gaussian(noise=...)"
        )
    floor = _LEAST_NOISE * squares.clamp_min(torch.finfo(outputs.dtype).tiny)
    return likelihood.update_noise(errors.maximum(floor), count, 0.0)


def _learns_by_output(likelihood: Likelihood) -> bool:
    """Whether each output has a noise to learn, for which there have to be samples."""
    return isinstance(likelihood, Gaussian) and likelihood.per_output


def _numbers(likelihood: Gaussian) -> Tensor:
    """Its noise variances as a tensor () or (C,)."""
    return torch.as_tensor(likelihood.variance, dtype=torch.float64, device="cpu")


def _in_words(values: float | Sequence[float] | None) -> str:
    """A few digits of one number or several."""
    found = values if isinstance(values, Sequence) else [values]
    return ", ".join("none" if v is None else f"{v:.3g}" for v in found[:4])


def _is_near(one: Likelihood, other: Likelihood) -> bool:
    """Whether noise variances have settled; some likelihoods have none."""
    if one.variance is None or other.variance is None:
        return True
    first = torch.as_tensor(one.variance, dtype=torch.float64, device="cpu")
    ratio = first / torch.as_tensor(other.variance, device="cpu")
    return bool((ratio.log().abs() < _SETTLED_NOISE).all())
