"""The log marginal likelihood of a model, by stochastic Lanczos quadrature.

With a preconditioner P = L L^T + Sigma and u = P^-1/2 z, z ~ N(0, P),

    log det H = log det P + tr log(P^-1/2 H P^-1/2)
              ~ log det P + mean_s n (e_1^T log(T_s) e_1),

T_s the tridiagonal matrix of a Lanczos run in the inner product of P^-1, started at z_s
(Ubaru, Chen & Saad, 2017; Wenger et al., 2022, arXiv:2107.00243: what P explains needs
no probes, so few are enough).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import generator_of, seed_of
from sgdgp.gpytorch_adapter import (
    Inputs,
    TracedProblem,
    prior_at,
    training_data,
    training_problems,
)
from sgdgp.operators import KernelOperator, choose_operator
from sgdgp.solvers.auto import Auto
from sgdgp.solvers.preconditioners import (
    PivotedCholesky,
    left_singular,
    low_rank_product,
)
from sgdgp.solvers.system import as_system
from sgdgp.training.gradient import EXACT_ROWS, exact_log_likelihood, residual

_TOLERANCE = 1e-3
"""Of the solve for the targets, whose error counts by its square."""

_INVARIANT = 1e-6
"""A Lanczos vector so short is rounding: the ones before it span all there is."""

_SMALLEST = 1e-300
"""Least eigenvalue whose logarithm is taken; rounding may leave negative ones."""


@dataclass(frozen=True)
class LogLikelihoodEstimate:
    """An estimate of log p(y | X).

    Attributes:
        value: The estimate, of all observations together (not divided by n).
        standard_error: Of the value, from the spread over the probes; 0 if exact.
        passes: Passes over K that it took.
    """

    value: float
    standard_error: float
    passes: float


def log_marginal_likelihood(
    model: ExactGP,
    x: Inputs | None = None,
    y: Tensor | None = None,
    *,
    num_probes: int = 8,
    seed: int | torch.Generator = 0,
) -> LogLikelihoodEstimate:
    """Estimate log p(y | X) of a model, without its parameters' priors.

    Args:
        model: A GPyTorch model with a Gaussian likelihood.
        x: Training inputs (n, d). Default: the model's.
        y: Training targets (n,) or (n, t). Default: the model's.
        num_probes: Lanczos runs; the standard error falls with their root.
        seed: Seed or generator of the probes.

    Returns:
        The estimate, in the units of the model's targets, not divided by n. Exact up
        to 1,000 rows.

    Raises:
        UnsupportedModelError: The prior is not a function of two points.
        ValueError: Data or settings do not fit; says which and why.
    """
    check_count("num_probes", num_probes, 2)
    x, y = training_data(model, x, y)
    number = seed_of(generator_of(seed))
    return total_log_likelihood(model, x, y, num_probes=num_probes, seed=number)


@torch.no_grad()
def total_log_likelihood(
    model: ExactGP, x: Inputs, y: Tensor, *, num_probes: int = 8, seed: int = 0
) -> LogLikelihoodEstimate:
    """The estimate for checked data, y in the model's units."""
    estimates = [
        estimate_log_likelihood(problem, num_probes=num_probes, seed=seed + i)
        for i, problem in enumerate(
            training_problems(prior_at(model, x), model.likelihood, x, y)
        )
    ]
    return LogLikelihoodEstimate(
        value=sum(estimate.value for estimate in estimates),
        standard_error=math.sqrt(
            sum(estimate.standard_error**2 for estimate in estimates)
        ),
        passes=sum(estimate.passes for estimate in estimates),
    )


@torch.no_grad()
def estimate_log_likelihood(
    problem: TracedProblem, *, num_probes: int = 8, seed: int = 0
) -> LogLikelihoodEstimate:
    """Estimate log p(y | X) of one system; exact up to 1,000 rows."""
    if len(problem.targets) <= EXACT_ROWS:
        return LogLikelihoodEstimate(exact_log_likelihood(problem)[1], 0.0, 1.0)
    operator = choose_operator(problem.kernel, problem.inputs.detach())
    noise, rhs = problem.noise.detach(), residual(problem)
    generator = torch.Generator().manual_seed(seed)
    solution = Auto(tolerance=_TOLERANCE).solve(
        operator, noise, rhs, generator=generator
    )
    v = solution.weights
    # v^T (b + r) = 2 v^T b - v^T H v: its error is of second order in that of v.
    remainder = rhs - operator.matmul(v) - noise.unsqueeze(1) * v
    fit = float((v.double() * (rhs + remainder).double()).sum())
    determinant, error, passes = log_determinant(
        operator, noise, num_probes=num_probes, generator=generator
    )
    n, columns = rhs.shape
    value = -0.5 * fit - 0.5 * columns * (determinant + n * math.log(2.0 * math.pi))
    return LogLikelihoodEstimate(
        value, 0.5 * columns * error, solution.passes + 1.0 + passes
    )


@torch.no_grad()
def log_determinant(
    operator: KernelOperator,
    noise: Float[Tensor, " n"],
    *,
    num_probes: int,
    max_steps: int = 40,
    tolerance: float = 1e-4,
    generator: torch.Generator,
) -> tuple[float, float, float]:
    """Estimate log det(K + Sigma); also its standard error, and the passes it took.

    Args:
        operator: K (n, n).
        noise: Noise variances (n,).
        num_probes: Lanczos runs.
        max_steps: Steps of each, at most: every one is a pass over K.
        tolerance: Change of the estimate over n from one step to the next that ends
            the runs.
        generator: Source of all randomness.
    """
    n = operator.shape[0]
    matrix, explained, passes = _whitened(operator, noise, generator)
    start = torch.randn(
        num_probes, n, generator=generator, device=generator.device, dtype=torch.float64
    ).mT.to(operator.x)
    estimates = start.new_zeros(num_probes, dtype=torch.float64)
    for step, (diagonal, off_diagonal) in enumerate(_lanczos(matrix, start, max_steps)):
        values, vectors = torch.linalg.eigh(
            torch.diag_embed(diagonal)
            + torch.diag_embed(off_diagonal, 1)
            + torch.diag_embed(off_diagonal, -1)
        )
        weight = vectors[:, 0, :].square()
        before = estimates
        estimates = n * (weight * values.clamp_min(_SMALLEST).log()).sum(1)
        passes += 1.0
        if step and float((estimates - before).mean().abs()) <= tolerance * n:
            break
    error = (
        float(estimates.std()) / math.sqrt(num_probes) if num_probes > 1 else math.inf
    )
    return explained + float(estimates.mean()), error, passes


def _whitened(
    operator: KernelOperator, noise: Tensor, generator: torch.Generator
) -> tuple[Callable[[Tensor], Tensor], float, float]:
    """R^-1 H R^-T as a function, log det R R^T, and the passes it took.

    R = Sigma^1/2 (I + Q diag(c^-1/2 - 1) Q^T) with the preconditioner's Q and c.
    """
    system = as_system(operator, noise, torch.ones_like(operator.diagonal())[:, None])
    factor, passes = PivotedCholesky().factor(system, generator)
    scale = system.noise.double().rsqrt()
    basis, squares = left_singular(factor, system.rhs.dtype, scale)
    shrunk = (1.0 + squares[:1]) / (1.0 + squares)
    explained = -float(shrunk.log().sum()) - 2.0 * float(scale.log().sum())
    like = system.rhs
    scale = scale.to(like)
    turn = (shrunk.sqrt() - 1.0).unsqueeze(1).to(like)

    def root_inverse(v: Tensor) -> Tensor:
        return v + low_rank_product(basis, turn, v)

    def matrix(v: Tensor) -> Tensor:
        inner = scale * root_inverse(v)
        return root_inverse(scale * system.product(inner))

    return matrix, explained, passes


def _lanczos(
    matrix: Callable[[Tensor], Tensor], start: Tensor, max_steps: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tridiagonal matrices (s, m), (s, m - 1) of s runs side by side, m = 1, 2, ...

    With full reorthogonalisation, which is nothing beside a pass.
    """
    basis = [start / start.norm(dim=0)]
    diagonal: list[Tensor] = []
    off_diagonal: list[Tensor] = []
    for _ in range(min(max_steps, start.shape[0])):
        image = matrix(basis[-1])
        diagonal.append((basis[-1] * image).sum(0).double())
        yield (
            torch.stack(diagonal, 1),
            torch.stack(off_diagonal, 1)
            if off_diagonal
            else start.new_zeros(start.shape[1], 0, dtype=torch.float64),
        )
        for _ in range(2):
            for vector in basis:
                image = image - vector * (vector * image).sum(0)
        norm = image.norm(dim=0)
        if float(norm.min()) <= _INVARIANT:
            return
        off_diagonal.append(norm.double())
        basis.append(image / norm)
