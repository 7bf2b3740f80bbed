"""The published rules are the published formulas."""

from __future__ import annotations

import pytest
import torch

from benchmarks.solvers.problem import Problem
from benchmarks.solvers.problems import make_problem, parse_problem
from benchmarks.solvers.published import PublishedSDD
from benchmarks.solvers.published_blocks import (
    PublishedADASAP,
    PublishedAP,
    largest_eigenvalue,
    nystrom_inverse,
)
from sgdgp.operators import DenseOperator


@pytest.fixture(scope="module")
def problem() -> Problem:
    spec = parse_problem("race:1", n=120, columns=3, dtype="float64")
    return make_problem(spec)


@pytest.fixture(scope="module")
def operator(problem: Problem) -> DenseOperator:
    return DenseOperator(problem.build_kernel(), problem.x)


def relative(method: PublishedAP | PublishedADASAP | PublishedSDD) -> float:
    h = method.operator.matmul(torch.eye(len(method.rhs), dtype=torch.float64))
    h.diagonal().add_(method.noise)
    residual = method.rhs - h @ method.weights
    return float((residual.norm(dim=0) / method.rhs.norm(dim=0)).max())


def test_a_step_of_sdd_is_that_of_a_dense_iteration(
    problem: Problem, operator: DenseOperator
) -> None:
    n, b, k, horizon = 120, 12, 5.0, 400
    method = PublishedSDD(
        operator,
        problem.noise,
        problem.rhs,
        step=k,
        block_size=b,
        horizon=horizon,
        generator=torch.Generator(),
    )
    h = operator.block(slice(0, n), slice(0, n)) + problem.noise * torch.eye(
        n, dtype=torch.float64
    )
    a = v = average = torch.zeros_like(problem.rhs)
    generator = torch.Generator().manual_seed(1)
    for _ in range(30):
        block = torch.randperm(n, generator=generator)[:b]
        chosen = torch.zeros(n, 1, dtype=torch.float64)
        chosen[block] = 1.0
        gradient = chosen * (h @ (a + 0.9 * v) - problem.rhs)
        v = 0.9 * v - k / n * (n / b) * gradient
        a = a + v
        average = 100 / horizon * a + (1 - 100 / horizon) * average
        method.step_on(block)
    torch.testing.assert_close(method.a, a, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(method.weights, average, rtol=1e-10, atol=1e-12)
    assert method.passes == pytest.approx(30 * b / n)


def test_alternating_projections_keep_an_exact_residual_and_converge(
    problem: Problem, operator: DenseOperator
) -> None:
    method = PublishedAP(operator, problem.noise, problem.rhs, block_size=50)
    assert method.passes == pytest.approx((50**2 + 50**2 + 20**2) / 120**2)
    h = operator.block(slice(0, 120), slice(0, 120)) + problem.noise * torch.eye(
        120, dtype=torch.float64
    )
    before = method.residual.clone()
    sizes = [float(before[r].norm(dim=0).sum()) for r in (slice(0, 50), slice(50, 100))]
    method.step()
    # The block that was chosen is solved for: its residual is gone.
    solved = [method.residual[r].norm() < 1e-10 for r in (slice(0, 50), slice(50, 100))]
    assert solved == [sizes[0] >= sizes[1], sizes[1] > sizes[0]]
    for _ in range(300):
        method.step()
    torch.testing.assert_close(
        method.residual, problem.rhs - h @ method.weights, rtol=0, atol=1e-10
    )
    assert relative(method) < 1e-3


def test_adasap_converges(problem: Problem, operator: DenseOperator) -> None:
    method = PublishedADASAP(
        operator,
        problem.noise,
        problem.rhs,
        block_size=24,
        rank=12,
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(300):
        method.step()
    assert relative(method) < 1e-3
    assert method.passes == pytest.approx(300 * 24 * (120 + 24) / 120**2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_nystrom_inverse_of_full_rank_is_the_damped_inverse(
    problem: Problem, operator: DenseOperator, dtype: torch.dtype
) -> None:
    corner = operator.block(slice(0, 30), slice(0, 30)).to(dtype)
    apply = nystrom_inverse(corner, 0.1, 30, torch.Generator().manual_seed(0))
    damping = 0.1 + float(torch.linalg.eigvalsh(corner)[0])
    g = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)
    expected = torch.linalg.solve(corner + damping * torch.eye(30, dtype=dtype), g)
    tolerance = 1e-3 if dtype == torch.float32 else 1e-8
    torch.testing.assert_close(apply(g), expected, rtol=tolerance, atol=tolerance)


def test_ten_power_iterations_find_a_dominant_eigenvalue() -> None:
    matrix = torch.diag(torch.tensor([5.0, 1.0, 0.5]))
    found = largest_eigenvalue(lambda v: matrix @ v, torch.ones(3, 1))
    assert found == pytest.approx(5.0, rel=1e-3)
