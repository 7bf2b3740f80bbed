"""Which operator is chosen, and which kernels are refused."""

from __future__ import annotations

import inspect
import re
from functools import cache
from typing import get_args

import pytest
import torch
from gpytorch.kernels import (
    InducingPointKernel,
    RBFKernel,
    RBFKernelGradGrad,
    RQKernel,
    ScaleKernel,
)
from gpytorch.likelihoods import GaussianLikelihood

import sgdgp
from sgdgp.kernels import fused
from sgdgp.operators import check_kernel, choose, choose_operator, operator_by_name
from sgdgp.operators.choose import OperatorName
from tests.operators.kernel_cases import CASES, L1Kernel


@pytest.mark.parametrize(
    ("kernel", "budget", "name"),
    [
        (RBFKernel(), 100 * 100 * 4, "dense"),
        (RBFKernel(), 100 * 100 * 4 - 1, "tiled"),
        (L1Kernel(), 100 * 100 * 4, "dense"),
        (L1Kernel(), 100 * 100 * 4 - 1, "row_blocks"),
        (RBFKernel(), None, "dense"),
    ],
)
def test_the_choice_follows_the_memory_budget(kernel, budget, name):
    operator = choose_operator(kernel, torch.zeros(100, 2), memory_budget=budget)
    assert operator.name == name


@pytest.mark.parametrize(
    ("kernel", "dtype", "name"),
    [
        (RBFKernel(), torch.float32, "tiled"),
        (ScaleKernel(RBFKernel()) + RBFKernel(), torch.float32, "tiled"),
        (RBFKernel(), torch.float64, "dense"),
        (RBFKernel() + RQKernel(), torch.float32, "dense"),
        (L1Kernel(), torch.float32, "dense"),
    ],
)
def test_many_rows_are_stored_only_where_their_tiles_are_not_compiled(
    kernel, dtype, name, monkeypatch
):
    monkeypatch.setattr(choose, "STORE_UP_TO", 99)
    monkeypatch.setattr(fused, "_library", cache(lambda: 0))
    x = torch.zeros(100, 2, dtype=dtype)
    assert choose_operator(kernel.to(dtype), x, memory_budget=1 << 20).name == name
    monkeypatch.setattr(choose, "STORE_UP_TO", 100)
    assert choose_operator(kernel, x, memory_budget=1 << 20).name == "dense"


def test_a_kernel_with_two_outputs_needs_four_times_the_memory():
    x = torch.zeros(50, 5, dtype=torch.float64)
    kernel = CASES["multitask"].kernel()
    needed = (2 * 50) ** 2 * 8
    assert choose_operator(kernel, x, memory_budget=needed).name == "dense"
    assert choose_operator(kernel, x, memory_budget=needed - 1).name == "row_blocks"


@pytest.mark.parametrize("name", ["dense", "tiled", "row_blocks"])
def test_an_operator_can_be_asked_for_by_name(name):
    operator = operator_by_name(name, RBFKernel(), torch.zeros(5, 2))
    assert operator.name == name
    assert operator_by_name("auto", RBFKernel(), torch.zeros(5, 2)).name == "dense"


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="operator: expected 'auto' or one of") as told:
        operator_by_name("lazy", RBFKernel(), torch.zeros(5, 2))
    assert all(repr(name) in str(told.value) for name in get_args(OperatorName))


@pytest.mark.parametrize("function", [sgdgp.condition, sgdgp.fit])
def test_docstrings_list_every_name(function):
    names = inspect.getdoc(function).split("operator: ")[1].split(".")[0]
    assert set(re.findall(r'"(\w+)"', names)) == {"auto", *get_args(OperatorName)}


@pytest.mark.parametrize("name", ["auto", "tiled", "dense"])
def test_a_budget_of_less_than_a_row_is_refused_and_a_row_is_enough(name):
    x = torch.rand(300, 2, generator=torch.Generator().manual_seed(0))
    operator = operator_by_name(name, RBFKernel(), x, memory_budget=1200)
    v = x[:, :1]
    truth = RBFKernel()(x).to_dense().detach() @ v
    torch.testing.assert_close(operator.matmul(v), truth)
    with pytest.raises(ValueError, match="memory_budget: expected at least 1200 bytes"):
        operator_by_name(name, RBFKernel(), x, memory_budget=1199)


def test_a_budget_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="memory_budget must be a positive"):
        choose_operator(RBFKernel(), torch.zeros(5, 2), memory_budget=0)


def _inducing():
    return InducingPointKernel(RBFKernel(), torch.zeros(2, 1), GaussianLikelihood())


@pytest.mark.parametrize(
    "kernel",
    [_inducing(), ScaleKernel(_inducing()), RBFKernelGradGrad()],
    ids=["inducing", "scaled inducing", "second derivatives"],
)
def test_kernels_that_are_no_functions_of_two_points_are_refused_by_name(kernel):
    with pytest.raises(ValueError, match=r"(InducingPoint|RBF)Kernel.*not supported"):
        choose_operator(kernel, torch.zeros(5, 1))


def test_kernels_with_a_batch_shape_are_refused():
    kernel = ScaleKernel(RBFKernel(batch_shape=torch.Size([2])))
    with pytest.raises(ValueError, match=r"batch_shape \(2,\)"):
        check_kernel(kernel)


def test_parameters_that_are_not_finite_are_named():
    kernel = ScaleKernel(RBFKernel())
    kernel.base_kernel.raw_lengthscale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"base_kernel\.raw_lengthscale is not finite"):
        check_kernel(kernel)


def test_points_that_are_no_tensor_are_refused():
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor, found .*ndarray"):
        choose_operator(RBFKernel(), torch.zeros(5, 2).numpy())


def test_what_is_no_kernel_is_refused():
    with pytest.raises(TypeError, match=r"gpytorch\.kernels\.Kernel, found Linear"):
        check_kernel(torch.nn.Linear(1, 1))
