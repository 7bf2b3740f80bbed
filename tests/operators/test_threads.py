"""Threads and the compiled pass: the same matrix, the same bits, within the budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, RQKernel, ScaleKernel

from sgdgp.kernels import fused
from sgdgp.operators import DenseOperator, TiledOperator, tiled
from tests.operators.matrix_truth import is_the_cross_matrix, is_the_matrix

FAMILIES = {
    "rbf": RBFKernel,
    "matern12": lambda: MaternKernel(0.5),
    "matern32": lambda: ScaleKernel(MaternKernel(1.5)),
    "matern52": lambda: ScaleKernel(MaternKernel(2.5)),
    "rational_quadratic": RQKernel,
    "sum": lambda: ScaleKernel(MaternKernel(1.5)) + RBFKernel(active_dims=(0, 1)),
}
N = 130


@pytest.fixture(params=[1, 2])
def threads(request, monkeypatch) -> Iterator[int]:
    """Every product is worth threads, and takes many tiles."""
    monkeypatch.setattr(tiled, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(tiled, "_LEAST_ROWS", 16)
    monkeypatch.setattr(tiled, "_TILE_ENTRIES_CPU", 40 * 40)
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_product_is_that_of_the_matrix(name, compiled, threads, monkeypatch):
    monkeypatch.setattr(fused, "_SMALLEST", 0 if compiled else 1 << 40)
    generator = torch.Generator().manual_seed(0)
    kernel = FAMILIES[name]().requires_grad_(False)
    x, new = torch.rand(N, 5, generator=generator), torch.rand(90, 5)
    wide = FAMILIES[name]().double().requires_grad_(False)
    truth = wide(x.double()).to_dense()
    between = wide(new.double(), x.double()).to_dense()

    def agree(found: torch.Tensor, expected: torch.Tensor) -> None:
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)

    operator = TiledOperator(kernel, x)
    is_the_matrix(operator, truth, 3, [7, 100, 7, 129, 11], [5, 8], (20, 111), agree)
    is_the_cross_matrix(operator.cross(new), between, 2, [3, 128, 3], agree)
    agree(DenseOperator(kernel, x).entries, truth)


def test_the_same_threads_give_the_same_bits(threads, generator):
    x = torch.rand(N, 4, generator=generator)
    v = torch.randn(N, 3, generator=generator)
    index = torch.randint(0, N, (20,), generator=generator)
    operator = TiledOperator(MaternKernel(1.5), x)
    once = operator @ v, operator.rows(index) @ v
    for _ in range(3):
        assert torch.equal(operator @ v, once[0])
        assert torch.equal(operator.rows(index) @ v, once[1])


@pytest.mark.parametrize("budget", [1, 400, 10**4])
def test_workers_share_the_budget(budget, threads, generator):
    x = torch.rand(30, 4, generator=generator)
    v = torch.randn(30, 3, generator=generator)
    operator = TiledOperator(MaternKernel(1.5), x, memory_budget=budget)
    truth = MaternKernel(1.5)(x).to_dense().detach() @ v
    torch.testing.assert_close(operator @ v, truth, rtol=1e-4, atol=1e-4)
    spare = operator._spare_workspaces
    assert 1 <= len(spare) <= threads
    # At the least two entries each.
    assert sum(flat.numel() for flat in spare) * 4 <= max(budget, threads * 8)


def test_in_inference_mode_and_outside_of_it(threads, generator):
    x = torch.rand(N, 4, generator=generator)
    v = torch.randn(N, 3, generator=generator)
    operator = TiledOperator(MaternKernel(1.5), x)
    with torch.inference_mode():
        inside, whole = operator.cross(x[:50]) @ v, operator @ v
    torch.testing.assert_close(inside, operator.cross(x[:50]) @ v)
    torch.testing.assert_close(whole, operator @ v)  # in the workspaces of before


@pytest.mark.parametrize("name", ["matern32", "sum"])
def test_gradients_of_a_form_are_those_of_the_matrix(name, threads, generator):
    kernel = FAMILIES[name]().double()
    x = torch.rand(N, 4, generator=generator).double().requires_grad_()
    a, b = torch.randn(2, N, 3, generator=generator).double()
    operator = TiledOperator(kernel, x)
    inputs = [x, *kernel.parameters()]
    form = operator.quadratic_form(a, b, x=x)
    expected = (a * (kernel(x).to_dense() @ b)).sum()
    torch.testing.assert_close(form, expected)
    torch.testing.assert_close(
        torch.autograd.grad(form, inputs), torch.autograd.grad(expected, inputs)
    )
