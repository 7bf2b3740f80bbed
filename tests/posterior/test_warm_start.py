"""A step of Thompson sampling: one per cent new data, a third of the passes at most."""

from __future__ import annotations

from dataclasses import replace

import gpytorch
import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood

import sgdgp
from sgdgp.features import draw_prior
from sgdgp.posterior.update import update_and_redraw
from sgdgp.solvers import Limits
from sgdgp.solvers.recycling import Directions
from sgdgp.solvers.subset_solve import solve_on_subset
from sgdgp.solvers.system import as_system
from sgdgp.solvers.warm_start import solve_new_columns
from tests.models import GP
from tests.solvers.test_recycling import random_directions

N, D = 2400, 8


def model_of(lengthscale, dtype=torch.float32):
    model = GP(
        torch.zeros(2, D),
        torch.zeros(2),
        ScaleKernel(MaternKernel(nu=1.5)),
        GaussianLikelihood(noise_constraint=gpytorch.constraints.GreaterThan(1e-9)),
    )
    model.kernel.outputscale = 1.0
    model.kernel.base_kernel.lengthscale = lengthscale
    model.likelihood.noise = 1e-6
    return model.to(dtype)


def thompson_data(lengthscale, dtype=torch.float32):
    """A prior draw at uniform points, and new points beside the largest values."""
    model = model_of(lengthscale, dtype)
    generator = torch.Generator().manual_seed(1)
    draw = draw_prior(
        model.kernel,
        1,
        dim=D,
        num_features=2000,
        generator=generator,
        dtype=dtype,
    )
    x = torch.rand(N, D, generator=generator).to(dtype)
    top = draw(x)[:, 0].topk(N // 100).indices
    steps = torch.randn(N // 100, D, generator=generator).to(dtype)
    x_new = (x[top] + 0.25 * lengthscale * steps).clamp(0, 1)
    return model, x, draw(x)[:, 0], x_new, draw(x_new)[:, 0]


def largest_residual(posterior):
    problem = posterior.problem
    matrix = problem.prior.kernel(problem.operator.x).to_dense().double()
    matrix.diagonal().add_(problem.noise.double())
    rhs = problem.rhs.double()
    left = rhs - matrix @ posterior.solution.weights.double()
    return float((left.norm(dim=0) / rhs.norm(dim=0)).max())


def passes_to_tolerance(posterior):
    """Passes after which all residuals were below the default tolerance."""
    history = posterior.solution.history
    reached = [e.passes for e in history if e.exact and max(e.residuals) <= 1e-3]
    return min(reached)


@pytest.mark.parametrize("lengthscale", [0.1, 0.3, 0.5])
def test_new_data_cost_less_than_a_third_of_a_cold_solve_at_the_same_residual(
    lengthscale,
):
    model, x, y, x_new, y_new = thompson_data(lengthscale)
    settings = {"num_samples": 16, "num_features": 512, "progress": False}
    posterior = sgdgp.condition(model, x, y, **settings)
    cold = sgdgp.condition(
        model, torch.cat([x, x_new]), torch.cat([y, y_new]), **settings
    )
    for _ in range(3):
        posterior = posterior.update(x_new, y_new, progress=False)
        assert posterior.solution.reason == "converged"
        # Means of either go on from there until they are right.
        assert passes_to_tolerance(posterior) < passes_to_tolerance(cold) / 3
        assert largest_residual(posterior) < 1.02e-3
        x_new = (x_new + 0.03).clamp(0, 1)
        y_new = y_new + 0.01


def test_with_other_columns_than_before_only_the_residuals_are_found_anew():
    model, x, y, x_new, y_new = thompson_data(0.3)
    outputs = torch.stack([y, y.flip(0)], dim=1)
    posterior = sgdgp.condition(
        model, x, outputs, num_samples=4, num_features=512, progress=False
    )
    more = torch.stack([y_new, y_new.flip(0)], dim=1)
    posterior = posterior.update(x_new, more, progress=False)
    for part in posterior.parts:
        assert largest_residual(part) < 1.02e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_correction_with_known_directions_is_that_of_the_larger_subspace(dtype):
    model, x, y, _, _ = thompson_data(0.4, dtype)
    x, y = x[:300], y[:300]
    operator = sgdgp.choose_operator(model.kernel, x)
    noise = torch.full((300,), 1e-3, dtype=dtype)
    matrix = model.kernel(x).to_dense().detach().double()
    matrix.diagonal().add_(1e-3)
    rhs = torch.stack([y, y.flip(0)], dim=1)
    old = torch.zeros(300, 2, dtype=torch.float64)
    old[:290] = torch.linalg.solve(matrix[:290, :290], rhs[:290].double())
    small = random_directions(matrix[:290, :290], 25)
    directions = torch.cat([small.directions, torch.zeros(10, 25).double()])
    known = Directions(directions.to(dtype), (matrix @ directions).to(dtype))
    found = solve_on_subset(
        as_system(operator, noise, rhs),
        old.to(dtype),
        10,
        Limits(1e-12, max_passes=1.5),
        factor_passes=1e6,
        memory_budget=2**30,
        residual=(rhs.double() - matrix @ old).to(dtype),
        known=known,
    )
    changed = (found.weights.double() - old) @ torch.eye(2).double()
    # Galerkin's condition: what is left is orthogonal to all that could be changed.
    left = rhs.double() - matrix @ (old + changed)
    size = float(rhs.double().norm())
    assert float((directions.mT @ left).abs().max()) < 1e-4 * size
    rows = found.settings["rows"]
    assert int((left.abs().amax(dim=1) < 1e-4 * size).sum()) >= rows


def test_new_draws_use_what_the_solve_before_has_left():
    model, x, y, x_new, y_new = thompson_data(0.3)
    settings = {"num_samples": 16, "num_features": 512, "progress": False}
    posterior = sgdgp.condition(model, x, y, **settings)
    for step in range(2):
        drawn = posterior.draw(16, seed=3)
        assert drawn.solution.reason == "converged"
        assert drawn.solution.passes < 0.7 * 15.0  # a solve from zero, measured
        problem = posterior.problem
        # Conditioned functions pass through the data, up to the noise draws.
        at_data = drawn(problem.x).double().mT - problem.targets.unsqueeze(1).double()
        assert float(at_data.abs().max()) < 0.05
        if step == 0:
            posterior = posterior.update(x_new, y_new, progress=False)


def test_columns_that_are_new_start_with_the_old_preconditioner():
    model, x, y, x_new, y_new = thompson_data(0.3)
    settings = {"num_samples": 16, "num_features": 512, "progress": False}
    posterior = sgdgp.condition(model, x, y, **settings)
    generator = torch.Generator().manual_seed(9)
    cold = posterior.solution.passes
    for data in ((x_new, y_new), (x_new[:0], y_new[:0])):
        (part,) = posterior.parts
        part = update_and_redraw(part, *data, generator)
        posterior = replace(posterior, solved=(part,))
        assert posterior.solution.solver == "renewed+cg"
        assert posterior.solution.passes < 0.75 * cold
        assert largest_residual(posterior) < 1.02e-3


def test_without_anything_left_nothing_is_renewed():
    model, x, y, _, _ = thompson_data(0.3)
    posterior = sgdgp.condition(
        model, x, y, solver=sgdgp.SDD(1e-1), num_samples=2, num_features=64
    )
    problem, before = posterior.problem, posterior.solution
    settings = {"memory_budget": problem.settings.memory_budget}
    system = (problem.operator, problem.noise, problem.rhs)
    assert solve_new_columns(problem.solver, *system, before, **settings) is None
