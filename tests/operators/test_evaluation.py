"""Dense kernel matrices, exact also where GPyTorch takes a short cut."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import IndexKernel, LinearKernel, MultitaskKernel

from sgdgp.gpytorch_adapter import multitask_inputs
from sgdgp.gpytorch_adapter.multitask import multitask_kernel
from sgdgp.operators.evaluation import differentiable_block
from tests.models import multitask_data, uneven
from tests.operators.kernel_cases import CASES


@pytest.mark.parametrize("name", CASES)
def test_every_kernel_is_gpytorchs(name):
    kernel, x = CASES[name].kernel(), CASES[name].x(9)
    for one, other in ((x, x), (x[:5], x), (x, x[2:4])):
        torch.testing.assert_close(
            differentiable_block(kernel, one, other),
            kernel(one, other).to_dense(),
            rtol=0,
            atol=1e-7,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_product_of_roots_is_exact_where_points_are_equal(dtype):
    kernel = uneven(MultitaskKernel(LinearKernel(), 3, rank=2)).to(dtype)
    x, _ = multitask_data(40, dtype=dtype)
    pairs = multitask_inputs(x, 3)
    data, task = kernel.data_covar_module, kernel.task_covar_module
    truth = torch.kron(data(x).to_dense(), task._eval_covar_matrix())
    found = differentiable_block(multitask_kernel(kernel, 2), pairs, pairs)
    torch.testing.assert_close(found, truth)


def test_gradients_are_right_where_points_are_equal():
    task = IndexKernel(2, active_dims=[1])
    kernel = uneven(LinearKernel(active_dims=[0]) * task)
    tasks = torch.tensor([[0.0], [1.0], [1.0]]).double()

    def block(points):
        x = torch.cat([points, tasks], dim=1)
        return differentiable_block(kernel, x, x)

    points = torch.tensor([[0.3], [1.2], [0.7]]).double().requires_grad_()
    assert torch.autograd.gradcheck(block, points)
