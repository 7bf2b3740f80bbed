"""Tiles: accuracy where rounding bites, memory, and what is refused."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from sgdgp.kernels.stationary import RBFTile
from sgdgp.operators import TiledOperator, register_tile_kernel, tile_kernel
from tests.operators.kernel_cases import CASES, L1Kernel, SquaredMatern


@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("d", [1, 3, 8])
def test_inputs_far_from_the_origin_keep_their_digits_in_float32(nu, d, generator):
    near = torch.randn(60, d, generator=generator, dtype=torch.float64).float()
    x = near + 1000.0
    kernel = MaternKernel(nu)
    truth = MaternKernel(nu).double()(x.double()).to_dense().detach()
    found = TiledOperator(kernel, x).matmul(torch.eye(60)).double()
    torch.testing.assert_close(found, truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("d", [2, 12])
def test_the_diagonal_is_exact_in_products_of_every_kind(d, generator):
    x = 30 * torch.randn(50, d, generator=generator)
    operator = TiledOperator(MaternKernel(0.5), x, memory_budget=4000)
    order = torch.randperm(50, generator=generator)
    identity = torch.eye(50)
    for product, rows in (
        (operator @ identity, torch.arange(50)),
        (operator.rows(order) @ identity, order),
        (operator.rows(slice(7, 31)) @ identity, torch.arange(7, 31)),
        (operator.block(order, slice(0, 50)), order),
        (operator.block(order, torch.arange(50)), order),
    ):
        assert (product[torch.arange(len(rows)), rows] == 1).all()


@pytest.mark.parametrize("d", [1, 3, 8, 20])
def test_duplicates_have_covariance_one(d, generator):
    x = torch.randn(20, d, generator=generator).repeat(2, 1)
    found = TiledOperator(MaternKernel(0.5), x).block(slice(0, 20), slice(20, 40))
    assert (found.diagonal() == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("d", [3, 8, 20])
def test_tiny_lengthscales_know_neighbours_from_duplicates(d, dtype, generator):
    x = torch.randn(300, d, generator=generator, dtype=dtype)
    x[100:200] = x[:100] + 1e-3 * torch.randn(100, d, generator=generator, dtype=dtype)
    x[200:] = x[:100]
    lengthscale = 1e-3 * d**0.5
    kernel = MaternKernel(0.5).to(dtype)
    kernel.lengthscale = lengthscale
    scaled = x.double() / kernel.lengthscale.item()
    truth = (-(scaled[:, None] - scaled).norm(dim=2)).exp().to(dtype)
    rtol, atol = (1e-3, 1e-6) if dtype == torch.float32 else (1e-9, 1e-14)
    for found in (
        TiledOperator(kernel, x).block(slice(0, 300), slice(0, 300)),
        TiledOperator(kernel, x[100:], x[:150]).matmul(torch.eye(200, dtype=dtype)),
    ):
        expected = truth if len(found) == 300 else truth[:150, 100:]
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("budget", [1, 1000, 10**5, 10**9])
def test_the_budget_bounds_the_workspace_and_not_the_result(budget, generator):
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64)
    v = torch.randn(300, 2, generator=generator, dtype=torch.float64)
    kernel = CASES["sum_of_products"].kernel()
    operator = TiledOperator(kernel, x, memory_budget=budget)
    torch.testing.assert_close(
        operator.rows(slice(10, 40)) @ v, kernel(x).to_dense().detach()[10:40] @ v
    )
    (workspace,) = operator._spare_workspaces
    assert workspace.numel() * 8 <= max(budget, workspace.shape[0] * 8)


def test_rows_may_repeat_and_come_in_any_order(generator):
    x = torch.randn(30, 2, generator=generator)
    v = torch.randn(30, 3, generator=generator)
    operator = TiledOperator(RBFKernel(), x)
    index = torch.tensor([5, 5, 0, 29, 5])
    torch.testing.assert_close(operator.rows(index) @ v, (operator @ v)[index])


def test_an_empty_set_of_rows_gives_an_empty_product(generator):
    x = torch.randn(30, 2, generator=generator)
    operator = TiledOperator(RBFKernel(), x)
    assert (operator.rows(slice(4, 4)) @ torch.ones(30, 3)).shape == (0, 3)
    empty = torch.empty(0, dtype=torch.long)
    assert (operator.rows(empty) @ torch.ones(30, 3)).shape == (0, 3)


def test_to_another_dtype_converts_entries_and_parameters(generator):
    x = torch.randn(20, 5, generator=generator)
    operator = TiledOperator(ScaleKernel(MaternKernel(2.5)), x).to(torch.float64)
    truth = operator.kernel(x.double()).to_dense().detach()
    assert operator.dtype == truth.dtype == torch.float64
    torch.testing.assert_close(operator @ torch.eye(20, dtype=torch.float64), truth)


def test_products_leave_no_graph_and_no_gradient(generator):
    x = torch.randn(10, 5, generator=generator).requires_grad_()
    kernel = ScaleKernel(MaternKernel(1.5))
    product = TiledOperator(kernel, x) @ torch.ones(10, 1)
    assert not product.requires_grad
    assert all(parameter.requires_grad for parameter in kernel.parameters())


@pytest.mark.parametrize("kernel", [L1Kernel(), SquaredMatern(1.5)])
def test_kernels_without_a_tile_form_are_refused_by_name(kernel):
    with pytest.raises(ValueError, match=f"{type(kernel).__name__} has no tile form"):
        TiledOperator(kernel, torch.zeros(3, 1))


def test_a_registered_kernel_has_a_tile_form_inside_others_too(generator):
    class Wide(RBFKernel):
        def forward(self, x1, x2, **params):
            return super().forward(x1 / 2, x2 / 2, **params)

    kernel = ScaleKernel(Wide(active_dims=(1, 2))) + RBFKernel()
    assert tile_kernel(kernel) is None

    @register_tile_kernel(Wide)
    def _(kernel, dims):
        return RBFTile(1.0, dims, 0.5 / kernel.lengthscale.detach()[0])

    x = torch.randn(9, 4, generator=generator)
    found = TiledOperator(kernel, x).block(slice(0, 9), slice(0, 9))
    torch.testing.assert_close(found, kernel(x).to_dense().detach())


@pytest.mark.parametrize(
    ("v", "message"),
    [
        (torch.ones(5), r"v must have shape \(4, k\), found \(5,\)"),
        (torch.ones(5, 1), r"v must have shape \(4, k\), found \(5, 1\)"),
        (torch.ones(4, 1, dtype=torch.float64), "v must be torch.float32"),
    ],
)
def test_right_factors_that_do_not_fit_are_named(v, message):
    operator = TiledOperator(RBFKernel(), torch.zeros(4, 2))
    with pytest.raises(ValueError, match=message):
        operator.rows(slice(0, 2)).matmul(v)


@pytest.mark.parametrize(
    ("index", "error", "message"),
    [
        (slice(0, 4, 2), ValueError, "slice with step 1, found step 2"),
        ([0, 1], TypeError, "integer tensor, found list"),
        (torch.tensor([0.0]), TypeError, "integers, found torch.float32"),
        (torch.tensor([[0]]), ValueError, r"shape \(b,\), found \(1, 1\)"),
        (torch.tensor([4]), IndexError, "out of range"),
    ],
)
def test_row_indices_that_do_not_fit_are_named(index, error, message):
    operator = TiledOperator(RBFKernel(), torch.zeros(4, 2))
    with pytest.raises(error, match=message):
        operator.rows(index).matmul(torch.ones(4, 1))


@pytest.mark.parametrize(
    ("x", "x_rows", "message"),
    [
        (torch.zeros(4), None, r"x must have shape \(n, d\), found \(4,\)"),
        (torch.zeros(4, 1, dtype=torch.long), None, "x must be floating point"),
        (torch.zeros(4, 2), torch.zeros(4, 3), "x_rows must have 2 columns"),
        (torch.zeros(4, 2), torch.zeros(4, 2).double(), "x_rows must be torch.float32"),
    ],
)
def test_inputs_that_do_not_fit_are_named(x, x_rows, message):
    with pytest.raises(ValueError, match=message):
        TiledOperator(RBFKernel(), x, x_rows)


def test_the_diagonal_of_a_cross_operator_is_refused():
    operator = TiledOperator(RBFKernel(), torch.zeros(4, 2)).cross(torch.ones(4, 2))
    with pytest.raises(ValueError, match="square"):
        operator.diagonal()
