"""The index kernel's tiles and their gradients, alone and in products."""

from __future__ import annotations

import pytest
import torch
from botorch.models.kernels.positive_index import PositiveIndexKernel
from gpytorch.kernels import IndexKernel, MaternKernel, RBFKernel

from sgdgp.operators import KeopsOperator, TiledOperator, tile_kernel
from tests.models import uneven


def inputs(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    task = torch.randint(0, 3, (n, 1), generator=generator)
    return torch.cat([x, task], dim=1)


def index(rank=2):
    return IndexKernel(3, rank=rank, active_dims=[2])


KERNELS = {
    "alone": index,
    "product": lambda: RBFKernel(active_dims=[0, 1]) * index(),
    "sum_of_products": lambda: (
        RBFKernel(active_dims=[0, 1]) * index(1)
        + MaternKernel(1.5, active_dims=[0]) * index(3)
    ),
    "positive": lambda: (
        RBFKernel(active_dims=[0]) * PositiveIndexKernel(3, rank=2, active_dims=[2])
    ),
}


@pytest.mark.parametrize("name", KERNELS)
def test_tiles_are_the_kernel(name):
    kernel = KERNELS[name]().double() if name == "positive" else uneven(KERNELS[name]())
    x, z = inputs(40), inputs(17, seed=1)
    operator = TiledOperator(kernel, x)
    v = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    dense = kernel(x, x[:39]).to_dense().detach()
    torch.testing.assert_close(
        operator.block(slice(0, 40), slice(0, 39)), dense, rtol=0, atol=1e-12
    )
    crossed = kernel(z, x).to_dense().detach()
    torch.testing.assert_close(operator.cross(z).matmul(v), crossed @ v)
    torch.testing.assert_close(operator.diagonal()[:39], dense.diagonal())


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_those_of_the_dense_matrix(name):
    kernel = KERNELS[name]().double() if name == "positive" else uneven(KERNELS[name]())
    x = inputs(30)
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, 4, generator=generator).double().unbind()
    parameters = [p for p in kernel.parameters() if p.requires_grad]
    value = TiledOperator(kernel, x).quadratic_form(a, b)
    found = torch.autograd.grad(value, parameters)
    # Row by row: GPyTorch sends equal inputs of a product through roots.
    dense = torch.cat([kernel(row, x).to_dense() for row in x.split(1)])
    torch.testing.assert_close(value, (a * (dense @ b)).sum())
    expected = torch.autograd.grad((a * (dense @ b)).sum(), parameters)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.keops
def test_keops_has_the_same_table():
    kernel, x = uneven(KERNELS["product"]()), inputs(40)
    v = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)).double()
    found = KeopsOperator(kernel, x).matmul(v)
    torch.testing.assert_close(found, TiledOperator(kernel, x).matmul(v))


@pytest.mark.parametrize("task", [-1.0, 3.0])
def test_tasks_that_are_not_in_the_table_are_refused(task):
    x = inputs(5)
    x[2, 2] = task
    with pytest.raises(ValueError, match="tasks from 0 to 2"):
        TiledOperator(index().double(), x)


def test_more_than_one_column_of_tasks_is_refused():
    with pytest.raises(ValueError, match="one column of tasks, found 3"):
        TiledOperator(IndexKernel(3).double(), inputs(5))


def test_a_subclass_with_another_forward_has_no_tiles():
    class Other(IndexKernel):
        def forward(self, i1, i2, **params):
            return super().forward(i1, i2, **params).mul(2.0)

    assert tile_kernel(IndexKernel(3)) is not None
    assert tile_kernel(Other(3)) is None
