"""The variational competitor: inducing points, with the optimum in closed form.

For known hyperparameters and points Z, the evidence lower bound is largest at
(Titsias, AISTATS 2009)

    q(u) = N(s^-2 Kzz A^-1 Kzx y, Kzz A^-1 Kzz),   A = Kzz + s^-2 Kzx Kxz,

which minibatches and natural gradients only approach. Functions come by Matheron's
rule, f(x) + K(x, Z) Kzz^-1 (u - f(Z)) (Wilson et al., ICML 2020), so that only
their evaluation at Z, and not at the data, has to be corrected.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.thompson_sampling.problem import KnownGP
from sgdgp.features import draw_prior
from sgdgp.gpytorch_adapter import prior_of
from sgdgp.operators import KernelOperator
from sgdgp.operators.choose import operator_by_name
from sgdgp.posterior.paths import ConditionedPaths, SampleFunctions
from sgdgp.solvers.base import Solution

_JITTER = 1e-8
_BLOCK = 2048


def inducing_functions(
    model: KnownGP,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    count: int,
    *,
    num_samples: int,
    num_features: int,
    generator: torch.Generator,
) -> SampleFunctions:
    """Sample functions of the optimal variational posterior.

    Args:
        model: Prior and noise.
        x: Observed points.
        y: Their values.
        count: Inducing points m, a random subset of the observed ones.
        num_samples: Functions to draw.
        num_features: Random features of their prior parts.
        generator: Of everything random.
    """
    start = time.perf_counter()
    prior = prior_of(model, x)
    noise = float(model.likelihood.noise)
    points = x[torch.randperm(len(x), generator=generator)[:count]]
    operator = operator_by_name("dense", prior.kernel, points, memory_budget=None)
    draws = draw_prior(
        prior.kernel,
        num_samples,
        dim=x.shape[1],
        num_features=num_features,
        generator=generator,
        dtype=x.dtype,
    )
    with torch.no_grad():
        factor, inner, right = _bound(operator, x, y, noise)
        target = _above(factor, torch.cholesky_solve(right, inner))
        normal = torch.randn(
            len(points), num_samples, generator=generator, dtype=torch.float64
        )
        # Kzz^-1 (u - mean of u) has covariance A^-1 = L^-T B^-1 L^-1.
        spread = _above(factor, _above(inner, normal))
        prior_part = torch.cholesky_solve(draws(points).double(), factor)
        weights = torch.cat([target, prior_part - spread], 1).to(x)
    solution = Solution(
        solver="closed form",
        operator=operator.name,
        weights=weights,
        residuals=weights.new_zeros(weights.shape[1]),
        passes=len(points) / len(x),
        seconds=time.perf_counter() - start,
        reason="converged",
        settings={"points": len(points)},
    )
    paths = ConditionedPaths(
        prior, operator, draws, weights, weights.new_zeros(len(weights)), x.shape[1]
    )
    return SampleFunctions(paths, solution)


def _bound(
    operator: KernelOperator, x: Tensor, y: Tensor, noise: float
) -> tuple[Tensor, Tensor, Tensor]:
    """L of Kzz, the factor of B = I + s^-2 L^-1 Kzx Kxz L^-T, and s^-2 L^-1 Kzx y."""
    wide = operator.to(torch.float64)
    everything = slice(0, len(wide.x))
    kzz = wide.block(everything, everything)
    kzz.diagonal().add_(_JITTER)
    factor = torch.linalg.cholesky(kzz)
    inner = torch.eye(len(kzz), dtype=torch.float64)
    right = inner.new_zeros(len(kzz), 1)
    for rows in torch.arange(len(x)).split(_BLOCK):
        kxz = wide.cross(x[rows].double()).block(slice(0, len(rows)), everything)
        part = torch.linalg.solve_triangular(factor, kxz.mT, upper=False)
        inner.addmm_(part, part.mT, alpha=1.0 / noise)
        right.addmm_(part, y[rows].double().unsqueeze(1), alpha=1.0 / noise)
    return factor, torch.linalg.cholesky(inner), right


def _above(factor: Tensor, right: Tensor) -> Tensor:
    """L^-T of the right-hand sides."""
    return torch.linalg.solve_triangular(factor.mT, right, upper=True)
