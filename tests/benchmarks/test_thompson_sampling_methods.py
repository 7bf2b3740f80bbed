"""The methods of the Thompson sampling benchmark, against dense linear algebra."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from linear_operator.utils import linear_cg
from torch import Tensor

from benchmarks.thompson_sampling.botorch_paths import botorch_functions
from benchmarks.thompson_sampling.inducing import inducing_functions
from benchmarks.thompson_sampling.methods import METHODS, RANDOM
from benchmarks.thompson_sampling.problem import Problem, make_problem
from benchmarks.thompson_sampling.request import Request
from benchmarks.thompson_sampling.textbook_cg import TextbookCG
from sgdgp.bayesopt import Functions
from sgdgp.operators.choose import operator_by_name
from sgdgp.solvers import PivotedCholesky
from sgdgp.solvers.system import as_system

REQUEST = Request(
    "sdd",
    seed=3,
    lengthscale=0.4,
    seconds=5.0,
    dim=2,
    initial=60,
    steps=1,
    batch=8,
    noise_std=0.1,
    num_features=256,
    objective_features=500,
    dtype="float64",
)


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    distance = math.sqrt(3) * torch.cdist(a, b) / REQUEST.lengthscale
    return (1 + distance) * torch.exp(-distance)


def _matrix(problem: Problem) -> Tensor:
    noise = problem.request.noise_std**2
    return _kernel(problem.x, problem.x) + noise * torch.eye(len(problem.x)).double()


def _points(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.rand(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return make_problem(REQUEST)


def test_the_same_problem_whatever_the_method_and_budget(problem: Problem) -> None:
    other = make_problem(replace(REQUEST, method="cg", seconds=1.0, batch=3, kept=True))
    torch.testing.assert_close(other.x, problem.x, rtol=0, atol=0)
    torch.testing.assert_close(other.y, problem.y, rtol=0, atol=0)
    x = _points(5, 2)
    torch.testing.assert_close(other.values(x), problem.values(x), rtol=0, atol=0)
    assert not torch.equal(make_problem(replace(REQUEST, seed=4)).x, problem.x)


def test_objectives_have_the_covariance_of_the_kernel() -> None:
    points = torch.tensor([[0.5, 0.5], [0.5, 0.6], [0.9, 0.1]], dtype=torch.float64)
    small = replace(REQUEST, initial=1)
    values = torch.stack(
        [make_problem(replace(small, seed=seed)).values(points) for seed in range(300)]
    )
    covariance = values.mT @ values / len(values)
    # Standard errors are at most sqrt(2 / 300) = 0.08.
    torch.testing.assert_close(covariance, _kernel(points, points), rtol=0, atol=0.25)


def test_observations_have_noise_of_the_stated_size(problem: Problem) -> None:
    x = _points(4000, 2)
    noise = problem.observed(x, step=1) - problem.values(x)
    assert float(noise.std()) == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noise, problem.observed(x, step=2) - problem.values(x))


def test_textbook_cg_solves_to_its_tolerance(problem: Problem) -> None:
    operator = operator_by_name(
        "dense", problem.model(problem.x, problem.y).covar_module, problem.x
    )
    rhs = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double()
    solution = TextbookCG(tolerance=1e-10, rank=5).solve(operator, 0.01, rhs)
    assert solution.reason == "converged"
    expected = torch.linalg.solve(_matrix(problem), rhs)
    torch.testing.assert_close(solution.weights, expected, rtol=1e-7, atol=1e-7)
    again = TextbookCG(tolerance=1e-9, rank=5).solve(
        operator, 0.01, rhs, initial=solution.weights
    )
    assert again.settings["iterations"] == 0


def test_textbook_cg_has_the_iterates_of_gpytorch(problem: Problem) -> None:
    operator = operator_by_name(
        "dense", problem.model(problem.x, problem.y).covar_module, problem.x
    )
    rhs = problem.y.unsqueeze(1)
    rank, iterations = 10, 4
    found = TextbookCG(max_passes=iterations + rank / 60, rank=rank).solve(
        operator, 0.01, rhs, generator=torch.Generator().manual_seed(5)
    )
    assert found.reason == "budget"
    assert found.settings["iterations"] == iterations
    system = as_system(operator, 0.01, rhs)
    inverse = PivotedCholesky(rank=rank).prepare(
        system, torch.Generator().manual_seed(5)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it did not converge
        theirs = linear_cg(
            lambda v: _matrix(problem) @ v,
            rhs,
            max_iter=iterations,
            max_tridiag_iter=0,
            tolerance=1e-12,
            preconditioner=inverse,
        )
    torch.testing.assert_close(found.weights, theirs, rtol=1e-5, atol=1e-5)
    residual = rhs - _matrix(problem) @ found.weights
    assert float(found.residuals) == pytest.approx(float(residual.norm() / rhs.norm()))


def test_inducing_points_at_all_data_give_the_exact_posterior(problem: Problem) -> None:
    functions = inducing_functions(
        problem.model(problem.x, problem.y),
        problem.x,
        problem.y,
        1000,
        num_samples=2,
        num_features=16,
        generator=torch.Generator().manual_seed(0),
    )
    x = _points(20, 2)
    mean, _ = functions.paths.evaluate(x, deviations=False)
    weights = torch.linalg.solve(_matrix(problem), problem.y)
    expected = _kernel(x, problem.x) @ weights
    torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-4)


def test_inducing_functions_have_the_moments_of_the_optimal_bound(
    problem: Problem,
) -> None:
    model = problem.model(problem.x, problem.y)
    functions = inducing_functions(
        model,
        problem.x,
        problem.y,
        12,
        num_samples=3000,
        num_features=2000,
        generator=torch.Generator().manual_seed(1),
    )
    z, x = functions.paths.operator.x, _points(6, 2)
    assert {*map(tuple, z.tolist())} < {*map(tuple, problem.x.tolist())}
    assert len(z) == 12
    kzz, kzx, kxz = _kernel(z, z), _kernel(z, problem.x), _kernel(x, z)
    precision = 1.0 / REQUEST.noise_std**2
    inner = kzz + precision * kzx @ kzx.mT
    mean = precision * kxz @ torch.linalg.solve(inner, kzx @ problem.y)
    variance = (
        1.0
        - (kxz * torch.linalg.solve(kzz, kxz.mT).mT).sum(1)
        + (kxz * torch.linalg.solve(inner, kxz.mT).mT).sum(1)
    )
    values = functions(x)
    standard_error = (variance / 3000).sqrt()
    assert bool(((values.mean(0) - mean).abs() < 5 * standard_error).all())
    # Five standard errors of 2.6 %, and what the random features are off.
    torch.testing.assert_close(values.var(0), variance, rtol=0.2, atol=1e-3)


@pytest.mark.parametrize("method", [name for name in METHODS if name != RANDOM])
def test_every_method_gives_functions_that_fit_the_data(
    problem: Problem, method: str
) -> None:
    fitted = METHODS[method](problem, problem.x, problem.y, 1, None)
    functions = fitted.functions
    assert isinstance(functions, Functions)
    assert functions.num_functions == 8
    values = functions(problem.x)
    assert values.shape == (8, 60)
    assert values.dtype == torch.float64
    assert float((values - problem.y).square().mean().sqrt()) < 0.25
    own = _points(8, 3, 2).requires_grad_()
    each = functions.each(own)
    (slope,) = torch.autograd.grad(each.sum(), own)
    everywhere = functions(own.detach().reshape(24, 2)).reshape(8, 8, 3)
    diagonal = everywhere[torch.arange(8), torch.arange(8)]
    torch.testing.assert_close(each.detach(), diagonal, rtol=1e-6, atol=1e-6)
    moved = own.detach() + 1e-5 * torch.ones(2).double()
    change = (functions.each(moved) - each).detach() / 1e-5
    torch.testing.assert_close(slope.sum(-1), change, rtol=1e-2, atol=1e-2)
    assert fitted.account["solve"] > 0


def test_botorchs_functions_are_drawn_without_touching_the_global_generator(
    problem: Problem,
) -> None:
    state = torch.random.get_rng_state()
    drawn = [
        botorch_functions(
            problem.model(problem.x, problem.y),
            problem.x,
            problem.y,
            num_samples=2,
            num_features=32,
            seed=seed,
        )(problem.x)
        for seed in (1, 1, 2)
    ]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("method", ["sdd", "cg"])
def test_kept_functions_go_on_from_the_last_step(problem: Problem, method: str) -> None:
    kept = Problem(problem.objective, problem.x, problem.y, replace(REQUEST, kept=True))
    first = METHODS[method](kept, problem.x, problem.y, 1, None)
    x = torch.cat([problem.x, _points(3, 2)])
    y = kept.observed(x, 1)
    y[:60] = problem.y
    second = METHODS[method](kept, x, y, 2, first)
    fresh = METHODS[method](problem, x, y, 2, first)
    assert first.posterior
    assert second.posterior
    assert fresh.posterior
    old = first.posterior.problem.draws(problem.x)
    torch.testing.assert_close(second.posterior.problem.draws(problem.x), old)
    assert not torch.allclose(fresh.posterior.problem.draws(problem.x), old)
    assert second.account["residual_largest"] < 0.01
    assert torch.allclose(second.posterior.problem.targets, y)
