"""Alternating projections: agreement, selection, active columns, honest ends."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import MaternKernel, PolynomialKernel

from sgdgp.operators import DenseOperator, TiledOperator
from sgdgp.solvers.alternating_projections import (
    AlternatingProjections,
    Greedy,
    RandomOrder,
    block_norms,
    default_block_size,
)
from sgdgp.solvers.blocks import factorise_block, partition
from sgdgp.solvers.system import as_system
from tests.solvers.problems import OPERATORS, Problem, problem, relative_error

SELECTIONS = [Greedy(), RandomOrder()]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", ["rbf", "matern12", "scale"])
def test_it_agrees_with_the_dense_solution(kernel, operator, selection):
    p = problem(kernel, 120, noise=1.0, operator=operator)
    solver = AlternatingProjections(tolerance=1e-9, block_size=40, selection=selection)
    found = p.solve(solver)
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-7
    assert float(p.residuals(found.weights).max()) <= 1e-9
    assert found.settings["blocks"] == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_block_is_a_direct_solve(dtype):
    p = problem("matern32", 100, dtype=dtype)
    found = p.solve(AlternatingProjections(tolerance=1e-4, block_size=100))
    assert found.reason == "converged"
    # The factor, the step and the check.
    assert found.passes == pytest.approx(3.0)


@pytest.mark.parametrize("block_size", [1, 7, 33])
def test_any_block_size_reaches_the_same_answer(block_size):
    p = problem("matern12", 50, noise=0.3)
    found = p.solve(AlternatingProjections(tolerance=1e-8, block_size=block_size))
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-6


def test_the_first_steps_are_the_projections_of_the_formula():
    p = problem("matern32", 60, noise=0.1, k=2)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(60, generator=generator)
    matrix, rhs = p.matrix[order][:, order], p.rhs[order]
    expected = torch.zeros_like(rhs)
    residual = rhs / rhs.norm(dim=0)
    for _ in range(3):
        norms = [float(residual[b].norm(dim=0).sum()) for b in partition(60, 20)]
        block = partition(60, 20)[norms.index(max(norms))]
        u = torch.linalg.solve(matrix[block, block], residual[block])
        expected[block] += u
        residual = residual - matrix[:, block] @ u
    seen = []
    p.solve(
        AlternatingProjections(tolerance=1e-12, block_size=20),
        callback=lambda q: bool(seen.append((q.residuals, q.weights()))) or True,
    )
    residuals, weights = seen[0]
    torch.testing.assert_close(weights[order] / rhs.norm(dim=0), expected)
    torch.testing.assert_close(residuals, residual.norm(dim=0))


def _clustered(n: int = 600) -> Problem:
    """Targets that live in one corner, inputs in clusters that hardly touch."""
    generator = torch.Generator().manual_seed(3)
    centres = 6.0 * torch.randn(12, 3, generator=generator, dtype=torch.float64)
    x = centres.repeat_interleave(n // 12, 0)
    x = x + 0.3 * torch.randn(n, 3, generator=generator, dtype=torch.float64)
    rhs = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    rhs[n // 12 :] *= 0.01
    operator = DenseOperator(MaternKernel(1.5).double(), x)
    return Problem(operator, torch.tensor(0.01).double(), rhs)


def test_greedy_needs_no_more_passes_than_random_order_to_a_loose_tolerance():
    p = _clustered()
    passes = {}
    for selection in SELECTIONS:
        solver = AlternatingProjections(
            tolerance=0.1, block_size=50, selection=selection
        )
        found = p.solve(solver)
        assert found.reason == "converged"
        passes[selection] = found.passes
    assert passes[Greedy()] <= passes[RandomOrder()]


def test_block_norms_are_those_of_the_slices():
    residual = torch.randn(53, 3, generator=torch.Generator().manual_seed(0))
    for size in (1, 8, 20, 53):
        blocks = partition(53, size)
        expected = torch.stack([residual[b].norm(dim=0) for b in blocks])
        torch.testing.assert_close(block_norms(residual, blocks), expected)


@pytest.mark.parametrize("size", [1, 8, 20, 52, 53, 100])
def test_a_partition_covers_every_row_once_with_blocks_of_almost_one_size(size):
    blocks = partition(53, size)
    rows = [row for block in blocks for row in range(53)[block]]
    assert rows == list(range(53))
    assert all(b.stop - b.start <= size for b in blocks)
    assert len({b.stop - b.start for b in blocks[:-1]}) <= 1


def test_default_blocks_grow_with_n_and_fit_the_memory():
    assert default_block_size(200, 1, 10**9) == 64
    assert default_block_size(3000, 17, 10**9) == 375
    assert 900 <= default_block_size(10_000, 1, 10**9) <= 1250
    assert default_block_size(10**7, 1, 10**9) == 4096
    assert default_block_size(10**6, 1, 500) == 500


def test_columns_that_are_done_are_left_alone_and_stay_done():
    p = problem("matern32", 200, noise=0.1, k=3)
    easy = Problem(p.operator, p.noise, p.rhs.clone())
    easy.rhs[:, 1] = p.matrix @ torch.randn(
        200, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    easy.rhs[:, 2] = 0.0
    widths = []

    class Spy(DenseOperator):
        def columns(self, index):
            block = super().columns(index)
            return type("B", (), {"matmul": lambda _, v: _seen(block, v)})()

        def permuted(self, order):
            return Spy(self.kernel, self.x[order])

    def _seen(block, v):
        widths.append(v.shape[1])
        return block.matmul(v)

    spied = Problem(Spy(p.operator.kernel, p.operator.x), p.noise, easy.rhs)
    found = spied.solve(AlternatingProjections(tolerance=1e-6, block_size=60))
    assert found.reason == "converged"
    assert float(spied.residuals(found.weights).max()) <= 1e-6
    assert max(widths) == 2  # the zero column never enters
    assert min(widths) == 1
    assert torch.equal(found.weights[:, 2], torch.zeros(200).double())


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
@pytest.mark.parametrize("kernel", ["rbf", "matern32"])
def test_low_noise_in_float32_is_told_as_it_is(kernel, noise):
    p = problem(kernel, 300, noise=noise, dtype=torch.float32)
    found = p.solve(AlternatingProjections(max_passes=40.0))
    true = p.residuals(found.weights)
    assert torch.isfinite(found.weights).all()
    assert float(true.max()) <= 1.0 + 1e-6
    assert (found.reason == "converged") == (float(true.max()) <= 0.01)
    slack = p.rounding(found.weights)
    assert bool(((found.residuals.double() - true).abs() <= slack).all())


def test_rows_keep_the_order_of_the_caller():
    p = problem("matern12", 120, noise=0.1)
    seen = []
    found = p.solve(
        AlternatingProjections(tolerance=1e-6, block_size=30),
        callback=lambda q: seen.append((q.residuals, q.weights())),
    )
    for residuals, weights in seen:  # running residuals are the true ones
        torch.testing.assert_close(p.residuals(weights), residuals, atol=1e-12, rtol=0)
    assert torch.equal(seen[-1][1], found.weights)


def test_an_indefinite_matrix_is_called_diverged():
    # Diagonal blocks are positive definite, the whole is not.
    n = 60
    operator = _Repelling(MaternKernel(1.5).double(), torch.zeros(n, 1).double())
    rhs = torch.randn(n, 2, generator=torch.Generator().manual_seed(0)).double()
    found = AlternatingProjections(block_size=2).solve(operator, 0.1, rhs)
    assert found.reason == "diverged"
    assert torch.isfinite(found.weights).all()
    assert float(found.residuals.max()) <= 1.0 + 1e-9


class _Repelling(DenseOperator):
    """1 on the diagonal and -0.3 off it: indefinite beyond four rows."""

    def __init__(self, kernel, x, *_, **__):
        super().__init__(kernel, x)
        n = len(x)
        self._entries = 1.3 * torch.eye(n).double() - 0.3

    def _rebuilt(self, x, x_rows, kernel=None):
        return _Repelling(self.kernel, x)


def test_a_block_below_the_rounding_of_float32_is_factorised_in_float64():
    p = problem("rbf", 100, noise=1e-6, dtype=torch.float32)
    system = as_system(p.operator, p.noise, p.rhs)
    inverse = factorise_block(system, slice(0, 100))
    assert inverse.factor.dtype == torch.float64
    assert inverse(p.rhs).dtype == torch.float32
    easy = problem("rbf", 100, noise=0.1, dtype=torch.float32)
    system = as_system(easy.operator, easy.noise, easy.rhs)
    assert factorise_block(system, slice(0, 9)).factor.dtype == torch.float32


def test_a_block_whose_norm_overflows_float32_is_factorised():
    kernel = PolynomialKernel(power=1)
    operator = DenseOperator(kernel, torch.full((3, 1), 1.2e19))
    system = as_system(operator, 1e-6, torch.ones(3, 1))
    assert not bool(operator.matmul(torch.ones(3, 1)).isfinite().any())
    inverse = factorise_block(system, slice(0, 3))
    assert bool(inverse(torch.randn(3, 1)).isfinite().all())


def test_a_block_that_is_not_positive_definite_is_refused():
    operator = _Repelling(MaternKernel(1.5).double(), torch.zeros(30, 1).double())
    system = as_system(operator, 0.1, torch.ones(30, 1).double())
    with pytest.raises(RuntimeError, match="not positive definite"):
        factorise_block(system, slice(0, 30))


def test_a_streamed_kernel_is_never_formed():
    p = problem("matern32", 300, operator="tiled", noise=0.3)
    assert isinstance(p.operator, TiledOperator)
    found = p.solve(AlternatingProjections())
    assert found.operator == "tiled"
    assert found.reason == "converged"


def test_a_selection_is_an_object_not_a_name():
    with pytest.raises(TypeError, match="selection"):
        AlternatingProjections(selection="greedy")
