"""Accelerated sketch-and-project: agreement, the formula, blocks, honest ends."""

from __future__ import annotations

import math

import pytest
import torch

from sgdgp.solvers.adasap import ADASAP, Acceleration, default_block_size
from sgdgp.solvers.blocks import ExactBlocks, NystromBlocks, nystrom_inverse
from sgdgp.solvers.system import as_system
from tests.solvers.problems import OPERATORS, problem, relative_error

PRECONDITIONERS = [NystromBlocks(), NystromBlocks(rank=10), ExactBlocks()]


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["rbf", "matern12", "scale"])
def test_it_agrees_with_the_dense_solution(kernel, operator, preconditioner):
    p = problem(kernel, 120, noise=1.0, operator=operator)
    solver = ADASAP(tolerance=1e-8, block_size=40, preconditioner=preconditioner)
    found = p.solve(solver)
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6
    assert found.settings["restarts"] == 0


@pytest.mark.parametrize(("mu", "nu"), [(0.05, 4.0), (0.01, 8.0), (0.25, 4.0)])
def test_the_iterates_are_those_of_the_paper(mu, nu):
    n, b = 60, 15
    p = problem("matern32", n, noise=0.1, k=2)
    mu = min(mu, 1 / nu)
    beta, gamma = 1 - math.sqrt(mu / nu), 1 / math.sqrt(mu * nu)
    alpha = 1 / (1 + gamma * nu)
    generator = torch.Generator().manual_seed(0)
    system = as_system(p.operator, p.noise, p.rhs)
    y = torch.zeros_like(p.rhs)
    v = y.clone()
    expected = []
    for _ in range(4):
        for block in system.operator.random_order(generator).tensor_split(n // b):
            gradient = p.matrix[block] @ y - system.rhs[block]
            d = torch.linalg.solve(p.matrix[block][:, block], gradient)
            w = y.clone()
            w[block] -= d
            v = beta * v + (1 - beta) * y
            v[block] -= gamma * d
            y = alpha * v + (1 - alpha) * w
        expected.append(y * system.scale)
    seen = []
    solver = ADASAP(
        tolerance=1e-14, block_size=b, preconditioner=ExactBlocks(), mu=mu, nu=nu
    )
    p.solve(solver, callback=lambda q: seen.append(q.weights()) or len(seen) == 4)
    for found, truth in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, truth)


def test_momentum_vanishes_where_mu_is_one_over_nu():
    acceleration = Acceleration(0.1, 10.0)
    assert acceleration.gamma == pytest.approx(1.0)
    assert acceleration.q == pytest.approx(0.1)


def test_exact_blocks_need_no_more_passes_than_nystrom_and_rank_helps():
    p = problem("matern32", 300, noise=0.05)
    passes = []
    for preconditioner in (ExactBlocks(), NystromBlocks(50), NystromBlocks(5)):
        found = p.solve(ADASAP(block_size=60, preconditioner=preconditioner))
        assert found.reason == "converged"
        passes.append(found.passes)
    assert passes[0] < passes[1] < passes[2]


def test_acceleration_beats_plain_projections_with_many_blocks():
    # Measured: 73 passes against 150. With ten blocks there is little to gain.
    p = problem("matern32", 200, noise=1e-3)
    settings = {"tolerance": 1e-3, "block_size": 5, "preconditioner": ExactBlocks()}
    fast, plain = p.solve(ADASAP(**settings)), p.solve(ADASAP(mu=1.0, **settings))
    assert plain.settings["mu"] == pytest.approx(1 / 40)  # no momentum
    assert fast.reason == plain.reason == "converged"
    assert fast.passes < 0.8 * plain.passes


@pytest.mark.parametrize("rank", [1, 10, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("noise", [1e-6, 0.1])
def test_the_step_of_a_nystrom_block_is_stable(noise, dtype, rank):
    p = problem("rbf", 60, noise=noise, dtype=dtype)
    system = as_system(p.operator, p.noise, p.rhs)
    block = torch.arange(60)
    generator = torch.Generator().manual_seed(1)
    inverse, eta = NystromBlocks(rank).step(system, block, generator)
    identity = torch.eye(60, dtype=dtype)
    preconditioned = eta * inverse(identity).double() @ p.matrix
    eigenvalues = torch.linalg.eigvals(preconditioned).real
    # Ten power iterations may miss the largest eigenvalue by some percent.
    assert 0.9 < float(eigenvalues.max()) < 1.3
    assert float(eigenvalues.min()) > -1e-2


def test_a_nystrom_block_of_full_rank_is_the_block():
    p = problem("rbf", 40, noise=0.5)
    system = as_system(p.operator, p.noise, p.rhs)
    generator = torch.Generator().manual_seed(1)
    apply, _ = NystromBlocks(40).step(system, torch.arange(40), generator)
    inverse = apply(torch.eye(40, dtype=torch.float64))
    # The damping is the smallest eigenvalue of K.
    smallest = torch.linalg.eigvalsh(p.matrix)[0] - 0.5
    damped = p.matrix + smallest * torch.eye(40).double()
    torch.testing.assert_close(inverse, torch.linalg.inv(damped), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("preconditioner", [NystromBlocks(), ExactBlocks()])
@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
@pytest.mark.parametrize("n", [50, 200])
def test_low_noise_is_told_as_it_is(n, kernel, preconditioner, dtype):
    p = problem(kernel, n, noise=1e-6, dtype=dtype)
    found = p.solve(ADASAP(max_passes=40.0, preconditioner=preconditioner))
    true = p.residuals(found.weights)
    slack = p.rounding(found.weights)
    assert torch.isfinite(found.weights).all()
    assert bool(((found.residuals.double() - true).abs() <= slack).all())
    assert bool((true <= 1.0 + slack).all())
    assert (found.reason == "converged") == (float(found.residuals.max()) <= 0.01)
    if n == 50:  # one block
        assert found.reason == "converged"


@pytest.mark.parametrize("averaging", [0.01, 0.5, 1.0])
def test_averaging_reaches_the_same_answer(averaging):
    p = problem("matern32", 150, noise=0.5)
    found = p.solve(ADASAP(tolerance=1e-3, averaging=averaging))
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 1e-3


def test_a_step_that_is_unstable_is_halved_and_reported():
    p = problem("matern32", 300, noise=1e-3)
    solver = ADASAP(preconditioner=ExactBlocks(), nu=1.0, mu=1e-8, block_size=50)
    found = p.solve(solver)
    assert found.settings["restarts"] > 0
    assert found.settings["step_scale"] == 0.5 ** found.settings["restarts"]
    assert "growing residual" in found.warnings[-1]
    true = p.residuals(found.weights)
    assert float(true.max()) <= 1.0 + 1e-9
    assert (found.reason == "converged") == (float(true.max()) <= 0.01)


@pytest.mark.parametrize(
    ("n", "block"), [(10, 64), (10_000, 100), (10**6, 10_000), (10**7, 10_000)]
)
def test_the_default_block_is_a_hundredth_within_bounds(n, block):
    assert default_block_size(n) == block


def test_a_preconditioner_is_an_object_with_a_rank():
    with pytest.raises(TypeError, match="preconditioner"):
        ADASAP(preconditioner="nystrom")
    with pytest.raises(ValueError, match="rank"):
        NystromBlocks(rank=0)


@pytest.mark.parametrize("n", [20, 64, 100])
@pytest.mark.parametrize("size", [1.0, 1e9, 1e18, 1e24])
def test_blocks_far_above_the_noise_are_preconditioned_whatever_their_scale(n, size):
    noise, generator = torch.full((n, 1), 1e-4), torch.Generator().manual_seed(0)
    matrix = torch.full((n, n), size)
    inverse = nystrom_inverse(matrix, noise, 100, generator)
    vectors = torch.randn(n, 3, generator=generator)
    assert ((vectors * inverse(vectors)).sum(0) > 0).all()
