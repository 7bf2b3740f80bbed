"""From a model and data to a posterior: one linear solve."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import torch
from gpytorch.kernels import Kernel
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.checks import check_count, check_finite, check_matrix, check_same
from sgdgp.features import ExactDraws, PriorDraws, draw_prior, has_features
from sgdgp.gpytorch_adapter import Prior, noise_of, prior_of, raw_training_data
from sgdgp.operators import KernelOperator, check_kernel
from sgdgp.operators.choose import choose_operator, operator_by_name
from sgdgp.operators.memory import resolve_budget
from sgdgp.posterior import fingerprint
from sgdgp.posterior.checkpoint import Checkpoint
from sgdgp.posterior.functions import ConditionedPaths, SampleFunctions
from sgdgp.posterior.pathwise import PathwisePosterior
from sgdgp.posterior.progress import progress_bar
from sgdgp.solvers.base import Callback, Solution, Solver
from sgdgp.solvers.choose import choose_solver

DEFAULT_FEATURES = 16_384
"""Random features per group of samples; about one kernel row's worth of work."""


def condition(
    model: ExactGP,
    x: Float[Tensor, "n d"] | Float[Tensor, " n"] | None = None,
    y: Float[Tensor, " n"] | Float[Tensor, "n 1"] | None = None,
    *,
    solver: Solver | str = "auto",
    num_samples: int = 64,
    seed: int | torch.Generator = 0,
    num_features: int = DEFAULT_FEATURES,
    operator: str = "auto",
    memory_budget: int | None = None,
    progress: bool | None = None,
    callback: Callback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int | float = 60,
) -> PathwisePosterior:
    """Condition a GPyTorch model on data by one stochastic linear solve.

    The model is read, never changed: mean, kernel, noise and transforms. Its
    posterior is represented by its mean and ``num_samples`` functions.

    Args:
        model: Any ``gpytorch.models.ExactGP`` definition (BoTorch's ``SingleTaskGP``
            included) without batch shape, with a Gaussian likelihood.
        x: Training inputs (n, d) before the model's own transforms. Default: the
            model's.
        y: Training targets (n,). Default: the model's.
        solver: A solver such as ``SDD(tolerance=1e-2)``, its name, or "auto".
        num_samples: Posterior sample functions; 0 for the mean alone.
        seed: Seed or generator of everything random.
        num_features: Random features of each group of 64 prior draws.
        operator: "auto", "dense", "tiled", "keops" or "row_blocks".
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called as the solve advances; returning True stops it.
        checkpoint: File that keeps the solve. Calling again after the process was
            killed goes on from there; after the solve has ended, it is returned at
            once. Budgets are for all runs together. See docs/checkpoints.md.
        every: Seconds between two writes of the checkpoint, at least.

    Returns:
        The posterior. ``posterior.solution.reason`` says how the solve ended.

    Raises:
        UnsupportedModelError: The prior is not a function of two points.
        CheckpointError: The checkpoint cannot be written, is damaged, or belongs to
            another problem (a ValueError).
        NoRandomFeatures: The kernel has no random features and n is too large for
            exact prior draws.
        TypeError: Data, settings or the likelihood are of the wrong kind.
        ValueError: Data, parameters or settings do not fit; says which and why.

    Example:
        >>> posterior = sgdgp.condition(model, num_samples=64, seed=0)
        >>> posterior.mean(x), posterior.variance(x), posterior.samples(x)
    """
    check_count("num_samples", num_samples, 0)
    check_count("num_features", num_features, 1)
    if memory_budget is not None:
        check_count("memory_budget", memory_budget, 1)
    if not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    keeper = None if checkpoint is None else Checkpoint(checkpoint, every)
    generator = _generator(seed)
    given = y is not None
    x, y = _data(model, x, y)
    prior = prior_of(model, x)
    check_kernel(prior.kernel)
    with torch.no_grad():
        mean, inputs = prior.evaluate(x)
        targets = (prior.to_model_units(y) if given else y) - mean
        noise = noise_of(prior.model.likelihood, prior.transformed(x)) + prior.nugget
    budget = resolve_budget(memory_budget, inputs.device)
    kernel_operator = (
        choose_operator(prior.kernel, inputs, memory_budget=budget)
        if operator == "auto"
        else operator_by_name(operator, prior.kernel, inputs, memory_budget=budget)
    )
    problem = _Problem(
        prior=prior,
        operator=kernel_operator,
        noise=noise,
        solver=choose_solver(solver, kernel_operator, budget),
        num_features=num_features,
        dim=x.shape[1],
        progress=progress,
        callback=callback,
    )
    if keeper is not None:
        keeper.open(
            fingerprint.components(
                prior.model,
                x,
                y,
                generator,
                num_samples=num_samples,
                num_features=num_features,
            )
        )
    start = time.perf_counter()
    draws = problem.draw_prior(num_samples, generator)
    sampled, noise_draws = problem.sample_targets(draws, generator)
    rhs = torch.cat([targets.unsqueeze(1), sampled], dim=1)
    drawn = time.perf_counter()
    solution = problem.solve(rhs, pad(noise_draws, (1, 0)), generator, keeper)
    timings = {
        "prior_draws": drawn - start,
        "solve": time.perf_counter() - drawn,
    }
    paths = ConditionedPaths(
        prior, kernel_operator, draws, solution.weights, x.shape[1]
    )

    def redraw(k: int, seed: int | torch.Generator) -> SampleFunctions:
        return problem.redraw(k, _draw_generator(seed), solution.weights[:, :1])

    return PathwisePosterior(solution, num_samples, timings, paths, redraw)


@dataclass(frozen=True)
class _Problem:
    """Everything that a solve with new prior draws needs again."""

    prior: Prior
    operator: KernelOperator
    noise: Tensor
    solver: Solver
    num_features: int
    dim: int
    progress: bool | None
    callback: Callback | None

    def draw_prior(
        self, count: int, generator: torch.Generator
    ) -> PriorDraws | ExactDraws:
        """Prior functions: by random features, else exactly by Cholesky."""
        inputs = self.operator.x
        kernel: Kernel = self.prior.kernel
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

    def sample_targets(
        self, draws: PriorDraws | ExactDraws, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """f_s(X) + eps_s (n, s), and eps_s alone (n, s)."""
        with torch.no_grad():
            values = draws(self.operator.x)
        standard = torch.randn(
            values.shape[1],
            values.shape[0],
            generator=generator,
            device=generator.device,
            dtype=values.dtype,
        )
        standard = standard.mT.to(values.device)
        deviation = self.noise.sqrt().unsqueeze(1)
        return values.addcmul(standard, deviation), standard * deviation

    def solve(
        self,
        rhs: Tensor,
        noise_draws: Tensor,
        generator: torch.Generator,
        keeper: Checkpoint | None = None,
    ) -> Solution:
        """The representer weights of all columns, kept in a checkpoint if asked."""

        def attempt(
            solver: Solver, initial: Tensor | None, callback: Callback | None
        ) -> Solution:
            # Whatever the solve stores of K goes with it; the posterior keeps none.
            return solver.solve(
                self.operator.unfilled(),
                self.noise,
                rhs,
                initial=initial,
                noise_draws=noise_draws,
                generator=generator,
                callback=callback,
            )

        with (
            torch.no_grad(),
            progress_bar(self.progress, self.solver.name, self.callback) as callback,
        ):
            if keeper is None:
                return attempt(self.solver, None, callback)
            probe = fingerprint.probe(self.operator, self.noise, rhs)
            return keeper.solve(self.solver, attempt, rhs, probe, callback)

    def redraw(
        self, k: int, generator: torch.Generator, mean_weights: Tensor
    ) -> SampleFunctions:
        """K new posterior functions around the same mean."""
        draws = self.draw_prior(k, generator)
        sampled, noise_draws = self.sample_targets(draws, generator)
        solution = self.solve(sampled, noise_draws, generator)
        weights = torch.cat([mean_weights, solution.weights], dim=1)
        return SampleFunctions(
            ConditionedPaths(self.prior, self.operator, draws, weights, self.dim),
            solution,
        )


def _data(model: ExactGP, x: Tensor | None, y: Tensor | None) -> tuple[Tensor, Tensor]:
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"model: expected a gpytorch.models.ExactGP, found {type(model).__name__}"
        )
    if (x is None) != (y is None):
        raise ValueError("x, y: expected both or neither, found one of them")
    if x is None or y is None:
        x, y = raw_training_data(model)
        if x is None or y is None:
            raise ValueError(
                "x, y: the model holds no training data; pass condition(model, x, y)"
            )
    if torch.is_tensor(x) and x.ndim == 1:
        x = x.unsqueeze(-1)
    if torch.is_tensor(x) and x.ndim == 3:
        raise ValueError(
            f"x: expected shape (n, d), found {tuple(x.shape)}; batch and multi-output"
            " models are not supported"
        )
    check_matrix("x", x)
    if not torch.is_tensor(y):
        raise TypeError(f"y: expected a torch.Tensor, found {type(y)}")
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (x.shape[0],):
        raise ValueError(f"y: expected shape ({x.shape[0]},), found {tuple(y.shape)}")
    check_same("y", y, "x", x)
    parameter = next(model.parameters(), None)
    if parameter is not None:
        check_same("x", x, "the model's parameters", parameter)
    check_finite("x", x)
    check_finite("y", y)
    return x.detach(), y.detach()


def _generator(seed: int | torch.Generator) -> torch.Generator:
    if isinstance(seed, torch.Generator):
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(
            f"seed: expected an int or a torch.Generator, found {type(seed).__name__}"
        )
    if not -(2**63) <= seed < 2**64:
        raise ValueError(f"seed: expected an integer of 64 bits, found {seed}")
    return torch.Generator().manual_seed(seed)


def _draw_generator(seed: int | torch.Generator) -> torch.Generator:
    """A stream of its own: draw(seed=s) is independent of condition(seed=s)."""
    generator = _generator(seed)
    if isinstance(seed, torch.Generator):
        return generator
    _, other = torch.randint(2**62, (2,), generator=generator).tolist()
    return generator.manual_seed(other)
