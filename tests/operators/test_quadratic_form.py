"""Quadratic forms and their gradients are those of the dense matrix."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from gpytorch.kernels import (
    ConstantKernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    ScaleKernel,
)

from sgdgp.kernels import differentiable_tile
from sgdgp.operators import (
    DenseOperator,
    KeopsOperator,
    RowBlocksOperator,
    TiledOperator,
    choose_operator,
)
from sgdgp.operators.gradients import form_by_autograd
from tests.operators.kernel_cases import CASES, TILED, gaussian
from tests.operators.quadratic_truth import (
    ROUGH,
    agree,
    by_autograd,
    by_operator,
    vectors,
)


@pytest.mark.parametrize("name", CASES)
@hypothesis.given(
    n=st.integers(1, 23),
    k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    budget=st.sampled_from([2**10, 2**14, 2**30]),
)
@hypothesis.settings(max_examples=4, phases=[hypothesis.Phase.generate])
def test_the_form_and_its_gradients_are_those_of_the_dense_matrix(
    name, n, k, seed, budget
):
    case = CASES[name]
    kernel, x = case.kernel(seed), case.x(n, seed)
    streaming = TiledOperator if case.tiled else RowBlocksOperator
    for operator in (
        streaming(kernel, x, memory_budget=budget),
        choose_operator(kernel, x, memory_budget=2**30),
    ):
        a, b = vectors(operator.shape[0], k, seed)
        source = getattr(operator, "source", operator)
        truth = by_autograd(source.kernel, x, a, b)
        agree(by_operator(operator, kernel, a, b), truth, 1e-9)


@pytest.mark.parametrize("name", TILED)
@pytest.mark.parametrize("budget", [2**12, 2**30])
def test_autograd_block_by_block_agrees_where_tiles_are_analytic(name, budget):
    def generic(operator, a, b, x):
        return form_by_autograd(operator.kernel, x, a, b, budget)

    case = CASES[name]
    kernel, x = case.kernel(1), case.x(19, 1)
    a, b = vectors(19, 3)
    found = by_operator(TiledOperator(kernel, x), kernel, a, b, generic)
    agree(found, by_autograd(kernel, x, a, b), 3e-6 if name in ROUGH else 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_float32_agrees_with_float64(name):
    case = CASES[name]
    kernel, x = case.kernel(2).float(), case.x(40, 2).float()
    operator = choose_operator(kernel, x, memory_budget=2**16)
    a, b = vectors(operator.shape[0], 3, dtype=torch.float32)
    truth = by_autograd(getattr(operator, "source", operator).kernel, x, a, b)
    # Cylindrical kernels lose digits in GPyTorch's own distances.
    agree(by_operator(operator, kernel, a, b), truth, 2e-3 if case.tiled else 2e-2)


@pytest.mark.parametrize("name", TILED)
def test_every_kernel_with_a_tile_form_has_an_analytic_gradient(name):
    case = CASES[name]
    x = case.x(3)
    assert differentiable_tile(case.kernel()).bind(x, x.mean(0)) is not None


@pytest.mark.parametrize("operator_type", [TiledOperator, DenseOperator, KeopsOperator])
def test_operators_of_a_kernel_with_tiles_do_not_differentiate_gpytorchs_forward(
    operator_type, monkeypatch
):
    kernel, x = CASES["matern32_ard"].kernel(), CASES["matern32_ard"].x(15)
    operator = operator_type(kernel, x)
    a, b = vectors(15, 2)
    truth = by_autograd(kernel, x, a, b)

    def refuse(*args, **kwargs):
        raise AssertionError("GPyTorch evaluated the kernel")

    monkeypatch.setattr(MaternKernel, "forward", refuse)
    agree(by_operator(operator, kernel, a, b), truth, 1e-9)


def test_gradients_are_those_of_finite_differences():
    case = CASES["sum_of_products"]
    kernel, x = case.kernel(4), case.x(12, 4)
    a, b = vectors(12, 2)
    _, gradients = by_operator(TiledOperator(kernel, x), kernel, a, b)
    step = 1e-5
    for name, parameter in kernel.named_parameters():
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * step)
            values.append((a * (TiledOperator(kernel, x) @ b)).sum().item())
            with torch.no_grad():
                parameter.sub_(sign * step)
        slope = (values[0] - values[1]) / (2 * step)
        assert gradients[name].sum().item() == pytest.approx(slope, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("name", ["matern32_ard", "periodic", "multitask", "sum"])
@hypothesis.given(seed=st.integers(0, 1000), scale=st.floats(-3, 3))
@hypothesis.settings(max_examples=5)
def test_forms_are_bilinear_and_so_are_their_gradients(name, seed, scale):
    case = CASES[name]
    kernel, x = case.kernel(seed), case.x(11, seed)
    operator = choose_operator(kernel, x, memory_budget=2**12)
    n = operator.shape[0]
    (a, b), (c, _) = vectors(n, 2, seed), vectors(n, 2, seed + 1)

    def both(left, right):
        value, gradients = by_operator(operator, kernel, left, right)
        found = [torch.zeros(1) if g is None else g for g in gradients.values()]
        return torch.cat([value.view(1), *(g.flatten() for g in found)])

    combined = both(a, b) + scale * both(c, b)
    torch.testing.assert_close(both(a + scale * c, b), combined, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(both(b, a), both(a, b), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("k", [1, 65, 130])
def test_the_number_of_columns_is_free(k):
    case = CASES["matern52"]
    kernel, x = case.kernel(), case.x(60)
    a, b = vectors(60, k)
    truth = by_autograd(kernel, x, a, b)
    agree(by_operator(TiledOperator(kernel, x), kernel, a, b), truth, 1e-9)


@pytest.mark.parametrize("name", ["matern12", "matern32", "rq", "periodic", "linear"])
def test_equal_left_and_right_vectors_take_no_other_way(name):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(30)
    a, _ = vectors(30, 3)
    truth = by_autograd(kernel, x, a, a)
    agree(by_operator(TiledOperator(kernel, x), kernel, a, a), truth, 1e-9)


@pytest.mark.parametrize("d", [1, 3, 5])
@pytest.mark.parametrize("nu", [0.5, 1.5, 2.5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_duplicated_points_give_finite_exact_gradients(nu, d, dtype):
    x = gaussian(10, d, torch.Generator().manual_seed(0)).repeat(3, 1).to(dtype)
    kernel = ScaleKernel(MaternKernel(nu)).to(dtype)
    a, b = vectors(30, 2, dtype=dtype)
    truth = by_autograd(kernel, x, a, b)
    relative = 1e-9 if dtype == torch.float64 else 1e-4
    agree(by_operator(TiledOperator(kernel, x), kernel, a, b), truth, relative)


@pytest.mark.parametrize("d", [2, 6])
@pytest.mark.parametrize("kernel", [RBFKernel(), MaternKernel(0.5), MaternKernel(1.5)])
def test_inputs_far_from_zero_keep_their_digits(kernel, d):
    x = gaussian(50, d, torch.Generator().manual_seed(0)).float() + 1000.0
    kernel = kernel.float()
    a, b = vectors(50, 2, dtype=torch.float32)
    truth = by_autograd(kernel, x, a, b)
    agree(by_operator(TiledOperator(kernel, x), kernel, a, b), truth, 1e-4)


def test_a_tiny_lengthscale_in_few_dimensions_keeps_its_digits():
    x = torch.linspace(-5, 5, 400).unsqueeze(1)
    kernel = RBFKernel()
    kernel.lengthscale = 0.02
    a, b = vectors(400, 2, dtype=torch.float32)
    truth = by_autograd(kernel, x, a, b)
    agree(by_operator(TiledOperator(kernel, x), kernel, a, b), truth, 1e-5)


def test_constraints_are_part_of_the_gradient():
    from gpytorch.constraints import Interval

    kernel = ScaleKernel(
        PeriodicKernel(lengthscale_constraint=Interval(0.1, 4.0))
        + ConstantKernel(constant_constraint=Interval(0.5, 2.0)),
        outputscale_constraint=Interval(0.2, 3.0),
    ).double()
    x, (a, b) = gaussian(9, 2, torch.Generator().manual_seed(1)), vectors(9, 2)
    agree(
        by_operator(TiledOperator(kernel, x), kernel, a, b),
        by_autograd(kernel, x, a, b),
        1e-9,
    )
