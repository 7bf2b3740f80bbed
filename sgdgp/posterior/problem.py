"""What a posterior is conditioned on: rows of data, right-hand sides, and their solve.

    (K + Sigma) V = [y - m(X) | f_s(X) + eps_s]

Outputs that were observed in the same rows share one system, hence one solve: all of
their right-hand sides meet every kernel entry together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from gpytorch.kernels import Kernel, ProductKernel
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.checks import check_count, check_followers
from sgdgp.core.errors import warn_user
from sgdgp.core.memory import resolve_budget
from sgdgp.core.seeds import (
    derived_generator,
    generator_of,
    seed_of,
    standard_normal,
)
from sgdgp.features import ExactDraws, PriorDraws, draw_prior, has_features
from sgdgp.gpytorch_adapter import Inputs, MultitaskPrior, Prior, observed_rows
from sgdgp.operators import KernelOperator, operator_by_name
from sgdgp.posterior.paths import ConditionedPaths
from sgdgp.posterior.variances import are_exact
from sgdgp.solvers.auto import DIRECT_ROWS, Auto, choose_solver
from sgdgp.solvers.base import Callback, Factor, Solution, Solver, progress_bar
from sgdgp.solvers.cholesky import Cholesky
from sgdgp.solvers.prediction_error import (
    ACCEPTED,
    error_of_mean,
)
from sgdgp.solvers.recycling import directions_to_keep
from sgdgp.solvers.solutions import continued, split_solution

DEFAULT_FEATURES = 16_384
"""Random features per group of samples; about one kernel row's worth of work."""


@dataclass(frozen=True)
class Settings:
    """How to draw and solve, now and later; nothing here says what the posterior is.

    Attributes:
        solver: Solver of this problem and of later ones.
        num_features: Random features of each group of prior draws.
        operator: Operator that was asked for, "auto" or a name.
        memory_budget: Bytes for operator and solver.
        seed: Where the noise of later data is derived from.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as a solve advances.
    """

    solver: Solver
    num_features: int
    operator: str
    memory_budget: int
    seed: int
    progress: bool | None = None
    callback: Callback | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_followers(self.progress, self.callback)

    @classmethod
    def resolve(
        cls,
        solver: Solver | str,
        num_features: int,
        operator: str,
        memory_budget: int | None,
        like: Tensor,
        seed: int | torch.Generator,
        progress: bool | None,
        callback: Callback | None,
    ) -> Settings:
        """What a user asked for, with the defaults on the device of ``like``.

        Raises:
            TypeError: Something is of the wrong kind.
            ValueError: Something is out of range.
        """
        check_count("num_features", num_features, 1)
        if memory_budget is not None:
            check_count("memory_budget", memory_budget, 1)
        budget = resolve_budget(memory_budget, like.device)
        return cls(
            choose_solver(solver, None, budget),
            num_features,
            operator,
            budget,
            seed_of(generator_of(seed)),
            progress,
            callback,
        )

    def stream(self, index: int, given: torch.Generator) -> torch.Generator:
        """Source of everything random of the system with this number.

        From the second on one of its own: a solve that is found finished in its
        checkpoint takes less from a generator than one that is run.
        """
        return derived_generator(self.seed, "system", index) if index else given

    def of_output(self, column: int) -> Settings:
        """Those of one output: later data of each have noise draws of their own."""
        if column == 0:
            return self
        stream = derived_generator(self.seed, "output", column)
        return replace(self, seed=seed_of(stream))

    def functions_can_wait(
        self,
        prior: Prior,
        data: Sequence[Observations],
        num_samples: int,
        seed: int | torch.Generator,
    ) -> bool:
        """Whether to solve for means alone first, directly: few rows know the rest.

        Not if somebody looks on, nor with a generator, which others go on with.

        Raises:
            ValueError: The functions cannot be drawn.
        """
        if num_samples == 0 or self.callback or self.progress:
            return False
        if isinstance(seed, torch.Generator):
            return False
        direct = isinstance(self.solver, Auto | Cholesky)
        few = all(len(rows.x) <= DIRECT_ROWS for rows in data)
        if not (direct and few and has_features(prior.kernel)):
            return False
        # Whatever there is to refuse is refused now: of products a number of features.
        products = any(isinstance(k, ProductKernel) for k in prior.kernel.modules())
        some = self if products else replace(self, num_features=1)
        some.draw_prior(prior.kernel, data[0].inputs, 1, torch.Generator())
        return True

    def operator_over(
        self, kernel: Kernel, inputs: Float[Tensor, "n p"]
    ) -> KernelOperator:
        """K over these kernel inputs."""
        return operator_by_name(
            self.operator, kernel, inputs, memory_budget=self.memory_budget
        )

    def draw_prior(
        self,
        kernel: Kernel,
        inputs: Float[Tensor, "n p"],
        count: int,
        generator: torch.Generator,
    ) -> PriorDraws | ExactDraws:
        """Prior functions: by random features, else exactly at the inputs by Cholesky.

        Raises:
            NoRandomFeatures: The kernel has none, and there are too many points.
        """
        if count and not has_features(kernel):
            return ExactDraws(kernel, count, inputs, generator=generator)
        return draw_prior(
            kernel,
            count,
            dim=inputs.shape[1],
            num_features=self.num_features,
            generator=generator,
            dtype=inputs.dtype,
            device=inputs.device,
        )


@dataclass(frozen=True, eq=False)
class Observations:
    """Targets that were observed in the same rows.

    Attributes:
        x: The prior's inputs (n, d): the user's, or pairs of those and tasks.
        inputs: Kernel inputs (n, p).
        y: Targets in the model's units (n, c).
        targets: y - m(X) (n, c).
        noise: Noise variances, with what ``forward`` adds to the diagonal (n,).
        columns: Outputs behind the columns of ``targets``; of a multitask model, whose
            targets are one column, the first.
    """

    x: Float[Tensor, "n d"]
    inputs: Float[Tensor, "n p"]
    y: Float[Tensor, "n c"]
    targets: Float[Tensor, "n c"]
    noise: Float[Tensor, " n"]
    columns: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Problem:
    """(K + Sigma) V = [y - m(X) | f_s(X) + eps_s] of one output.

    Attributes:
        prior: Mean, kernel and units.
        operator: K (n, n) over the kernel inputs; the same object for outputs that were
            observed in the same rows, which share a solve.
        x: The prior's inputs (n, d): the user's, or pairs of those and tasks.
        noise: Noise variances, the diagonal of Sigma (n,).
        draws: Prior functions f_s, kernel inputs (n, p) -> (n, s).
        rhs: Right-hand sides (n, 1 + s): targets, then sample targets.
        noise_draws: The part of ``rhs`` drawn from N(0, Sigma): zero, then eps_s.
        settings: How to draw and solve again.
    """

    prior: Prior
    operator: KernelOperator = field(repr=False)
    x: Float[Tensor, "n d"] = field(repr=False)
    noise: Float[Tensor, " n"] = field(repr=False)
    draws: PriorDraws | ExactDraws = field(repr=False)
    rhs: Float[Tensor, "n k"] = field(repr=False)
    noise_draws: Float[Tensor, "n k"] = field(repr=False)
    settings: Settings

    @property
    def solver(self) -> Solver:
        """Solver of this problem and of later ones."""
        return self.settings.solver

    @property
    def targets(self) -> Float[Tensor, " n"]:
        """Targets y - m(X) in the model's units."""
        return self.rhs[:, 0]

    @property
    def sample_targets(self) -> Float[Tensor, "n s"]:
        """f_s(X) + eps_s."""
        return self.rhs[:, 1:]

    def paths(
        self, weights: Float[Tensor, "n k"], factor: Factor | None = None
    ) -> ConditionedPaths:
        """The posterior functions with these weights."""
        dim = self.x.shape[1]
        return ConditionedPaths(
            self.prior, self.operator, self.draws, weights, self.noise, dim, factor
        )

    def solve(
        self,
        generator: torch.Generator,
        *,
        initial: Float[Tensor, "n k"] | None = None,
        after: Solution | None = None,
        operator: KernelOperator | None = None,
        listener: Callback | None = None,
        for_updates: bool = True,
    ) -> Solution:
        """The representer weights of all columns.

        Args:
            generator: Source of everything random in the solver.
            initial: Weights to start from (n, k). Default: zero.
            after: A solution to go on from, with what it has left of the budgets; what
                is returned accounts for both.
            operator: K with entries it may have stored already. Default: whatever the
                solve stores of K goes with it.
            listener: Called as the solve advances, before the settings' callback.
            for_updates: Keep what a solve with more rows may start from.
        """
        settings, solver, passes, seconds = self.settings, self.solver, 0.0, 0.0
        if after is not None:
            initial, passes, seconds = after.weights, after.passes, after.seconds
            solver = solver.with_limits(solver.limits.less(passes, seconds))
        if for_updates:
            kept = directions_to_keep(self.rhs, settings.memory_budget)
            solver = solver.with_recycling(kept)
        with (
            torch.no_grad(),
            progress_bar(
                settings.progress,
                solver.name,
                listener,
                settings.callback,
                passes=passes,
                seconds=seconds,
            ) as callback,
        ):
            solution = solver.solve(
                self.operator.unfilled() if operator is None else operator,
                self.noise,
                self.rhs,
                initial=initial,
                noise_draws=self.noise_draws,
                generator=generator,
                callback=callback,
            )
        return solution if after is None else continued(after, solution)


@dataclass(frozen=True, eq=False)
class Part:
    """One output of a posterior: a problem and its solution.

    Attributes:
        problem: What was solved.
        solution: Its representer weights (n, 1 + s), the mean's first. Passes, seconds
            and history are those of the whole solve, whoever shared it.
        timings: Seconds for "prior_draws" and "solve".
        passes_from_zero: Passes that the first solve took, which updates went on from.
    """

    problem: Problem
    solution: Solution
    timings: dict[str, float]
    passes_from_zero: float = 0.0

    @property
    def paths(self) -> ConditionedPaths:
        """The posterior functions."""
        return self.problem.paths(self.solution.weights, self.solution.factor)

    @property
    def needs_no_functions(self) -> bool:
        """Whether mean and variances are exact without them, surely."""
        found = self.solution
        direct = found.solver == Cholesky.name and found.reason == "converged"
        # Functions tell in how few directions the error may be: one, at worst.
        error = (found.prediction_error or 0.0) * len(found.weights) ** 0.5
        return direct and error <= ACCEPTED and are_exact(self.problem.operator)


def groups_of(parts: Sequence[Part]) -> list[list[int]]:
    """Numbers of the parts that share a system, hence a solve."""
    groups: dict[KernelOperator, list[int]] = {}
    for number, part in enumerate(parts):
        groups.setdefault(part.problem.operator, []).append(number)
    return list(groups.values())


@torch.no_grad()
def observed_data(parts: Sequence[Part]) -> list[tuple[Tensor, Tensor]]:
    """Inputs (n, d) and targets (n,) of each output, in the user's units."""
    data = []
    for part in parts:
        prior, x = part.problem.prior, part.problem.x
        y = part.problem.targets + prior.evaluate(x)[0]
        if isinstance(prior, MultitaskPrior):
            rows = [x[:, -1] == task for task in range(prior.num_outputs)]
            data += [
                (x[of_task, :-1], scale.shift + scale.scale * y[of_task])
                for of_task, scale in zip(rows, prior.outcome_scales, strict=True)
            ]
        else:
            data.append((x, prior.outcome_scale.shift + prior.outcome_scale.scale * y))
    return data


def joined(problems: Sequence[Problem]) -> Problem:
    """Problems of one system as one: their right-hand sides side by side."""
    first, *others = problems
    if not others:
        return first
    return replace(
        first,
        rhs=torch.cat([problem.rhs for problem in problems], dim=1),
        noise_draws=torch.cat([problem.noise_draws for problem in problems], dim=1),
    )


def parts_of(
    numbers: Sequence[int],
    problems: Sequence[Problem],
    solution: Solution,
    timings: dict[str, float],
    passes_from_zero: float = 0.0,
) -> dict[int, Part]:
    """The parts of a posterior with these numbers, by the solution of all together."""
    widths = [problem.rhs.shape[1] for problem in problems]
    solutions = split_solution(solution, widths)
    return {
        number: Part(problem, _judged(problem, solved), timings, passes_from_zero)
        for number, problem, solved in zip(numbers, problems, solutions, strict=True)
    }


@torch.no_grad()
def _judged(problem: Problem, solution: Solution) -> Solution:
    """The solution with what it means for predictions of the mean."""
    error = error_of_mean(
        problem.operator, problem.noise, problem.rhs, problem.noise_draws, solution
    )
    return replace(solution, prediction_error=error)


@torch.no_grad()
def observations(prior: Prior, x: Inputs, y: Tensor) -> tuple[Observations, ...]:
    """The data of a model, divided by the rows that outputs were observed in.

    Args:
        prior: The model's prior.
        x: Training inputs (n, d), or several.
        y: Targets in the model's units (n,) or (n, T), NaN where there is none.

    Raises:
        ValueError: y does not have the model's outputs, is missing altogether, or the
            noise does not fit.
    """
    points = prior.joined(x)
    if points.untyped_storage().filename is None:
        points = points.clone()  # the user may write into x, other than into a file
    tasks, n = prior.num_outputs, len(points)
    if tasks > 1 and y.shape != (n, tasks):
        raise ValueError(
            f"y: expected shape ({n}, {tasks}), one column for each task of the model, "
            f"found {tuple(y.shape)}"
        )
    rows, noise = prior.rows(points), prior.training_noise(points)
    return tuple(
        _observations(
            prior, rows[seen.rows], seen.targets, noise[seen.rows], seen.columns
        )
        for seen in observed_rows(y, tasks)
    )


def _observations(
    prior: Prior, x: Tensor, y: Tensor, noise: Tensor, columns: tuple[int, ...]
) -> Observations:
    mean, inputs = prior.evaluate(x)
    centred = y - mean.unsqueeze(1)
    columns = columns[: y.shape[1]]
    return Observations(x, inputs, y, centred, noise + prior.nugget, columns)


def problems_of(
    prior: Prior,
    data: Observations,
    settings: Settings,
    num_samples: int,
    generator: torch.Generator,
    functions: bool = True,
) -> list[Problem]:
    """The problems of these outputs, their prior functions and noise newly drawn.

    Without functions their columns are zero: the mean's is rounded as beside them.
    """
    check_count("num_samples", num_samples, 0)
    count = num_samples if functions else 0
    operator = settings.operator_over(prior.kernel, data.inputs)
    problems = []
    for column, targets in zip(data.columns, data.targets.mT, strict=True):
        draws = settings.draw_prior(prior.kernel, data.inputs, count, generator)
        sides = right_hand_sides(targets, draws, data.inputs, data.noise, generator)
        if count < num_samples:
            rhs, noise_draws = (pad(side, (0, num_samples)) for side in sides)
            sides = rhs, noise_draws
        own = settings.of_output(column)
        problems.append(
            Problem(prior, operator, data.x, data.noise, draws, *sides, own)
        )
    return problems


def sample_targets(
    draws: PriorDraws | ExactDraws,
    inputs: Float[Tensor, "n p"],
    noise: Float[Tensor, " n"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s"]]:
    """f_s(X) + eps_s (n, s), and eps_s alone (n, s)."""
    with torch.no_grad():
        values = draws(inputs)
    standard = standard_normal(*values.mT.shape, like=values, generator=generator).mT
    deviation = noise.sqrt().unsqueeze(1)
    return values.addcmul(standard, deviation), standard * deviation


def right_hand_sides(
    targets: Float[Tensor, " n"],
    draws: PriorDraws | ExactDraws,
    inputs: Float[Tensor, "n p"],
    noise: Float[Tensor, " n"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """[y - m(X) | f_s(X) + eps_s], and of it what is noise: [0 | eps_s]."""
    sampled, noise_draws = sample_targets(draws, inputs, noise, generator)
    rhs = torch.cat([targets.unsqueeze(1), sampled], dim=1)
    return rhs, pad(noise_draws, (1, 0))


def announce(verb: str, parts: Sequence[Part]) -> Sequence[Part]:
    """The parts; warns, once, of solves that ended short of what they were to reach."""
    told: dict[str, None] = {}
    for part in parts:
        solution = part.solution
        error = solution.prediction_error or 0.0
        if solution.reason in ("diverged", "stagnated", "budget"):
            told[" ".join(solution.warnings)] = None
        elif solution.reason == "converged" and error > ACCEPTED:
            told[
                f"The mean is off by about {error:.2g} standard deviations of what it "
                "predicts: it needs a smaller tolerance, or float64 data where targets "
                "are large beside the noise."
            ] = None
    for sentence in told:
        warn_user(f"sgdgp.{verb}: {sentence}")
    return parts


class Stopwatch:
    """Seconds of one stage of the work after another."""

    def __init__(self) -> None:
        """Start the first one."""
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def end(self, stage: str) -> None:
        """Note how long this stage took, and start the next one."""
        now = time.perf_counter()
        self.seconds[stage] = now - self._start
        self._start = now
