"""The posterior of independent outputs that share kernel and noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal, MultivariateNormal
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator, RootLinearOperator
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import generator_of_draws
from sgdgp.posterior.functions import Points
from sgdgp.posterior.output_paths import OutputFunctions, ParallelPaths
from sgdgp.posterior.outputs import MultiOutputPosterior, given_noise, new_targets
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.problem import prior_draws, sample_targets
from sgdgp.posterior.systems import joined_problem
from sgdgp.posterior.together import updated_together
from sgdgp.solvers.solutions import merged_solution, split_solution


@dataclass(frozen=True, eq=False)
class IndependentPosterior(MultiOutputPosterior):
    """The posterior of independent outputs that share kernel and noise.

    Outputs that were observed in the same rows share one operator and one solve.
    """

    kind = "independent"

    @classmethod
    def of(cls, parts: Sequence[PathwisePosterior]) -> IndependentPosterior:
        """Posteriors of one output each, side by side."""
        first = _groups(parts)
        timings = {
            name: sum(parts[group[0]].timings.get(name, 0.0) for group in first)
            for name in parts[0].timings
        }
        solution = merged_solution([part.solution for part in parts], first)
        paths = ParallelPaths(tuple(part.paths for part in parts))
        return cls(solution, parts[0].num_samples, timings, paths, tuple(parts))

    def draw(self, k: int, *, seed: int | torch.Generator = 1) -> OutputFunctions:
        """New functions, independent from output to output."""
        check_count("k", k, 1)
        generator = generator_of_draws(seed)
        groups = _groups(self.parts)
        paths, solutions = {}, {}
        for group in groups:
            problems = []
            for output in group:
                problem = self.parts[output].problem
                draws = prior_draws(
                    problem.prior, problem.operator, k, problem.settings, generator
                )
                rhs, noise_draws = sample_targets(
                    draws, problem.operator.x, problem.noise, generator
                )
                problems.append(
                    replace(problem, rhs=rhs, noise_draws=noise_draws, draws=draws)
                )
            solved = joined_problem(problems).solve(generator)
            parts = split_solution(solved, [k] * len(group))
            for output, problem, part in zip(group, problems, parts, strict=True):
                mean = self.parts[output].solution.weights[:, :1]
                weights = torch.cat([mean, part.weights], dim=1)
                paths[output], solutions[output] = problem.paths(weights), part
        outputs = range(self.num_outputs)
        return OutputFunctions(
            ParallelPaths(tuple(paths[output] for output in outputs)),
            merged_solution([solutions[output] for output in outputs], groups),
        )

    def update(
        self,
        x_new: Points,
        y_new: Float[Tensor, "m t"],
        *,
        noise: Float[Tensor, "m t"] | Float[Tensor, " m"] | None = None,
        **settings: Any,
    ) -> IndependentPosterior:
        """The posterior given more data; see ``MultiOutputPosterior.update``."""
        flat, _ = self.paths.flattened(x_new)
        y_new = new_targets(y_new, len(flat), self.num_outputs)
        if noise is not None:
            noise = given_noise(noise, len(flat), self.num_outputs)
        missing = torch.isnan(y_new)
        updated = dict(enumerate(self.parts))
        for group in _alike(_groups(self.parts), missing, noise):
            rows = (~missing[:, group[0]]).nonzero().squeeze(1)
            if len(rows) == 0:
                continue
            parts = updated_together(
                [self.parts[output] for output in group],
                flat[rows],
                y_new[rows][:, group],
                noise=None if noise is None else noise[rows, group[0]],
                **settings,
            )
            updated.update(zip(group, parts, strict=True))
        return IndependentPosterior.of([updated[t] for t in range(self.num_outputs)])

    def _joint(
        self, mean: Tensor, root: Tensor, noise: Tensor | None
    ) -> MultitaskMultivariateNormal:
        # Outputs are independent: their samples say nothing about each other.
        covariance = RootLinearOperator(root.transpose(0, 1).contiguous())
        if noise is not None:
            covariance = covariance + DiagLinearOperator(noise.mT.contiguous())
        return MultitaskMultivariateNormal.from_batch_mvn(
            MultivariateNormal(mean.mT.contiguous(), covariance)
        )

    def likelihood_noise(self, x: Tensor) -> Tensor:
        prior = self.parts[0].paths.prior
        noise = prior.target_scale.scale**2 * prior.noise(x)
        return noise.unsqueeze(1).expand(-1, self.num_outputs)


def _groups(parts: Sequence[PathwisePosterior]) -> list[list[int]]:
    """Outputs that share an operator, hence a solve."""
    together: dict[int, list[int]] = {}
    for output, part in enumerate(parts):
        together.setdefault(id(part.paths.operator), []).append(output)
    return list(together.values())


def _alike(
    groups: list[list[int]], missing: Tensor, noise: Tensor | None
) -> list[list[int]]:
    """Groups divided where new data differ in their gaps or in their noise."""
    found: list[list[int]] = []
    for group in groups:
        kinds: dict[object, list[int]] = {}
        for output in group:
            gaps = tuple(missing[:, output].tolist())
            own = None if noise is None else tuple(noise[:, output].tolist())
            kinds.setdefault((gaps, own), []).append(output)
        found.extend(kinds.values())
    return found
