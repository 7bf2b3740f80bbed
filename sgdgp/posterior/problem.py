"""What a posterior was conditioned on: all that draws, new data and storage need."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.features import ExactDraws, PriorDraws, draw_prior, has_features
from sgdgp.gpytorch_adapter import Prior
from sgdgp.operators import KernelOperator
from sgdgp.posterior.checkpoint import SolveCheckpoint
from sgdgp.posterior.functions import ConditionedPaths, SampleFunctions
from sgdgp.solvers.base import Callback, Solution, Solver, progress_bar
from sgdgp.solvers.recycling import Recycled, directions_to_keep
from sgdgp.solvers.warm_start import solve_again


@dataclass(frozen=True)
class Settings:
    """How to solve and draw again; nothing here changes what the posterior is.

    Attributes:
        num_features: Random features of each group of prior draws.
        operator: Operator that was asked for, "auto" or a name.
        memory_budget: Bytes for operator and solver.
        seed: Where the noise of later data is derived from.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as a solve advances.
    """

    num_features: int
    operator: str
    memory_budget: int
    seed: int
    progress: bool | None = None
    callback: Callback | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, eq=False)
class Problem:
    """(K + Sigma) V = [y - m(X) | f_s(X) + eps_s], and where it came from.

    Attributes:
        prior: Mean, kernel and units.
        operator: K (n, n) over the kernel inputs.
        x: The user's training inputs (n, d).
        noise: Noise variances, the diagonal of Sigma (n,).
        rhs: Right-hand sides (n, 1 + s): targets, then sample targets.
        noise_draws: The part of ``rhs`` drawn from N(0, Sigma): zero, then eps_s.
        draws: Prior functions f_s, kernel inputs (n, p) -> (n, s).
        solver: Solver of this problem and of later ones.
        settings: How to draw and solve again.
    """

    prior: Prior
    operator: KernelOperator = field(repr=False)
    x: Float[Tensor, "n d"] = field(repr=False)
    noise: Float[Tensor, " n"] = field(repr=False)
    rhs: Float[Tensor, "n k"] = field(repr=False)
    noise_draws: Float[Tensor, "n k"] = field(repr=False)
    draws: PriorDraws | ExactDraws = field(repr=False)
    solver: Solver
    settings: Settings

    @property
    def targets(self) -> Float[Tensor, " n"]:
        """Targets y - m(X) in the model's units."""
        return self.rhs[:, 0]

    @property
    def sample_targets(self) -> Float[Tensor, "n s"]:
        """f_s(X) + eps_s."""
        return self.rhs[:, 1:]

    def solve(
        self,
        generator: torch.Generator,
        *,
        initial: Float[Tensor, "n k"] | None = None,
        keeper: SolveCheckpoint | None = None,
        filled: KernelOperator | None = None,
    ) -> Solution:
        """The representer weights of all columns.

        Args:
            generator: Source of everything random in the solver.
            initial: Weights to start from (n, k). Default: zero.
            keeper: Checkpoint that keeps them.
            filled: ``operator`` with entries it may have stored already. Default:
                whatever the solve stores of K goes with it.
        """
        return self._solve(
            self.rhs,
            self.noise_draws,
            generator,
            initial,
            keeper,
            filled,
            for_updates=True,
        )

    def redraw(
        self, k: int, generator: torch.Generator, solved: Solution
    ) -> SampleFunctions:
        """K new posterior functions around the same mean.

        Args:
            k: Number of functions.
            generator: Source of their prior draws and noise.
            solved: The solution of this problem; what it leaves is used again.
        """
        draws = prior_draws(self.prior, self.operator, k, self.settings, generator)
        sampled, noise_draws = sample_targets(
            draws, self.operator.x, self.noise, generator
        )
        solution = self._solve_again(sampled, noise_draws, generator, solved.recycled)
        weights = torch.cat([solved.weights[:, :1], solution.weights], dim=1)
        return SampleFunctions(self.paths(weights, draws), solution)

    def paths(
        self,
        weights: Float[Tensor, "n k"],
        draws: PriorDraws | ExactDraws | None = None,
    ) -> ConditionedPaths:
        """The posterior functions with these weights, of these draws or its own."""
        draws = self.draws if draws is None else draws
        return ConditionedPaths(
            self.prior, self.operator, draws, weights, self.x.shape[1]
        )

    def _solve_again(
        self,
        rhs: Tensor,
        noise_draws: Tensor,
        generator: torch.Generator,
        recycled: Recycled | None,
    ) -> Solution:
        """Other right-hand sides, with preconditioner and directions of a solve."""
        shown, callback = self.settings.progress, self.settings.callback
        if recycled is None or not self.solver.resumes:
            return self._solve(rhs, noise_draws, generator)
        operator = self.operator.unfilled()
        with progress_bar(shown, "cg", callback) as callback:
            solution = solve_again(
                self.solver, operator, self.noise, rhs, recycled, callback
            )
        if solution.reason == "stagnated":
            return self._solve(rhs, noise_draws, generator, solution.weights)
        return solution

    def _solve(
        self,
        rhs: Tensor,
        noise_draws: Tensor,
        generator: torch.Generator,
        start: Tensor | None = None,
        keeper: SolveCheckpoint | None = None,
        filled: KernelOperator | None = None,
        *,
        for_updates: bool = False,
    ) -> Solution:
        operator = self.operator.unfilled() if filled is None else filled

        def attempt(
            solver: Solver, initial: Tensor | None, callback: Callback | None
        ) -> Solution:
            if for_updates:
                kept = directions_to_keep(rhs, self.settings.memory_budget)
                solver = solver.with_recycling(kept)
            return solver.solve(
                operator,
                self.noise,
                rhs,
                initial=initial,
                noise_draws=noise_draws,
                generator=generator,
                callback=callback,
            )

        shown, callback = self.settings.progress, self.settings.callback
        with (
            torch.no_grad(),
            progress_bar(shown, self.solver.name, callback) as callback,
        ):
            if keeper is None:
                return attempt(self.solver, start, callback)
            return keeper.solve(
                self.solver, attempt, self.operator, self.noise, rhs, callback
            )


def prior_draws(
    prior: Prior,
    operator: KernelOperator,
    count: int,
    settings: Settings,
    generator: torch.Generator,
) -> PriorDraws | ExactDraws:
    """Prior functions: by random features, else exactly by Cholesky.

    Raises:
        NoRandomFeatures: The kernel has none, and there are too many points.
    """
    inputs = operator.x
    if count and not has_features(prior.kernel):
        return ExactDraws(prior.kernel, count, inputs, generator=generator)
    return draw_prior(
        prior.kernel,
        count,
        dim=inputs.shape[1],
        num_features=settings.num_features,
        generator=generator,
        dtype=inputs.dtype,
        device=inputs.device,
    )


def sample_targets(
    draws: PriorDraws | ExactDraws,
    inputs: Float[Tensor, "n p"],
    noise: Float[Tensor, " n"],
    generator: torch.Generator,
) -> tuple[Float[Tensor, "n s"], Float[Tensor, "n s"]]:
    """f_s(X) + eps_s (n, s), and eps_s alone (n, s)."""
    with torch.no_grad():
        values = draws(inputs)
    standard = torch.randn(
        values.shape[1],
        values.shape[0],
        generator=generator,
        device=generator.device,
        dtype=values.dtype,
    )
    standard = standard.mT.to(values.device)
    deviation = noise.sqrt().unsqueeze(1)
    return values.addcmul(standard, deviation), standard * deviation


def right_hand_sides(
    targets: Float[Tensor, " n"],
    sampled: Float[Tensor, "n s"],
    noise_draws: Float[Tensor, "n s"],
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """[targets | sampled], and [0 | noise_draws]."""
    rhs = torch.cat([targets.unsqueeze(1), sampled], dim=1)
    return rhs, pad(noise_draws, (1, 0))
