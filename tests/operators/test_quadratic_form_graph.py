"""What the graph of a quadratic form reaches, and what it costs."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import (
    MaternKernel,
    RBFKernel,
    ScaleKernel,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sgdgp.operators import RowBlocksOperator, TiledOperator, choose_operator
from sgdgp.operators.evaluation import detached_copy
from tests.operators.kernel_cases import CASES, gaussian
from tests.operators.quadratic_truth import (
    agree,
    by_autograd,
    by_operator,
    vectors,
)


def test_a_deep_kernel_is_differentiated_down_to_its_network():
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)
    ).double()
    kernel = CASES["product"].kernel()
    x, (a, b) = gaussian(20, 4, torch.Generator().manual_seed(1)), vectors(20, 2)
    features = network(x)
    form = TiledOperator(kernel, features).quadratic_form(a, b, x=features)
    wanted = [*network.parameters(), *kernel.parameters()]
    found = torch.autograd.grad(form, wanted)
    truth = (a * (kernel(network(x)).to_dense() @ b)).sum()
    expected = torch.autograd.grad(truth, wanted)
    torch.testing.assert_close(form, truth)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["rbf_ard", "user_l1"])
def test_the_form_may_be_used_twice_and_inside_other_terms(name):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(9)
    a, b = vectors(9, 2)
    operator = choose_operator(kernel, x, memory_budget=2**12)
    form = operator.quadratic_form(a, b)
    (3 * form + form**2).backward()
    _, truth = by_autograd(kernel, x, a, b)
    for parameter_name, parameter in kernel.named_parameters():
        torch.testing.assert_close(
            parameter.grad, (3 + 2 * form.detach()) * truth[parameter_name]
        )


@pytest.mark.parametrize("name", ["rbf_ard", "user_l1", "multitask"])
def test_quadratic_gradient_adds_to_what_is_there(name):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(9)
    operator = choose_operator(kernel, x)
    a, b = vectors(operator.shape[0], 2)
    with torch.no_grad():
        operator.quadratic_gradient(a, b)
    operator.quadratic_gradient(a, b)
    _, truth = by_autograd(kernel, x, a, b)
    for parameter_name, parameter in kernel.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * truth[parameter_name])


@pytest.mark.parametrize("name", ["sum", "user_l1", "sum_with_unknown"])
def test_frozen_parameters_stay_without_gradient(name):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(9)
    a, b = vectors(9, 2)
    operator = choose_operator(kernel, x, memory_budget=2**12)
    frozen, *live = kernel.parameters()
    _, truth = by_operator(operator, kernel, a, b)
    frozen.requires_grad_(False)
    operator.quadratic_gradient(a, b)
    assert frozen.grad is None
    _, *expected = (truth[n] for n, _ in kernel.named_parameters())
    torch.testing.assert_close([p.grad for p in live], expected)
    kernel.requires_grad_(False)
    form = operator.quadratic_form(a, b)
    assert not form.requires_grad
    operator.quadratic_gradient(a, b)


def test_a_parameter_that_two_kernels_share_gets_both_gradients():
    shared = RBFKernel().double()
    other = MaternKernel(1.5).double()
    other.raw_lengthscale = shared.raw_lengthscale
    kernel = ScaleKernel(shared).double() + other * shared
    x, (a, b) = gaussian(9, 2, torch.Generator().manual_seed(1)), vectors(9, 2)
    agree(
        by_operator(TiledOperator(kernel, x), kernel, a, b),
        by_autograd(kernel, x, a, b),
        1e-9,
    )


@pytest.mark.parametrize("name", ["matern32_ard", "user_l1", "grid_interpolation"])
def test_parameters_changed_in_place_are_seen(name):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(12)
    a, b = vectors(12, 2)
    optimiser = torch.optim.SGD(kernel.parameters(), lr=1e-3)
    for _ in range(3):
        operator = choose_operator(kernel, x)
        truth = by_autograd(operator.source.kernel, x, a, b)
        agree(by_operator(operator, kernel, a, b), truth, 1e-9)
        optimiser.zero_grad()
        operator.quadratic_form(a, b).backward()
        optimiser.step()


def test_a_dynamic_grid_is_copied_but_its_parameters_are_the_callers():
    case = CASES["grid_interpolation"]
    kernel = case.kernel()
    operator = RowBlocksOperator(kernel, case.x(12))
    assert operator.kernel is not kernel
    operator.quadratic_gradient(*vectors(12, 2))
    assert kernel.base_kernel.raw_lengthscale.grad.abs().item() > 1e-3
    with torch.no_grad():  # no cache may answer for parameters of yesterday
        before = operator.matmul(vectors(12, 2)[0])
        kernel.base_kernel.lengthscale = 3.0
        assert not torch.allclose(operator.matmul(vectors(12, 2)[0]), before)


class Traced(ScaleKernel):
    """A scale whose factor is computed by somebody else."""

    def __init__(self, base_kernel, factor):
        super().__init__(base_kernel)
        del self.raw_outputscale
        self.factor = factor

    def forward(self, x1, x2, diag=False, **params):
        return self.base_kernel.forward(x1, x2, diag=diag, **params) * self.factor


def test_tensors_that_are_not_parameters_pass_their_gradient_on():
    root = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    base, x = CASES["rbf_ard"].kernel(), CASES["rbf_ard"].x(9)
    a, b = vectors(9, 2)
    operator = choose_operator(Traced(base, root.square()), x)
    form = operator.quadratic_form(a, b)
    form.backward()
    torch.testing.assert_close(root.grad, 2 * form.detach() / root.detach())
    _, truth = by_autograd(ScaleKernel(base), x, a, b)
    factor = ScaleKernel(base).outputscale.item()
    torch.testing.assert_close(
        base.raw_lengthscale.grad,
        truth["base_kernel.raw_lengthscale"] * root.item() ** 2 / factor,
        rtol=1e-6,
        atol=1e-6,
    )
    assert not detached_copy(operator.kernel).factor.requires_grad
    assert operator.to(torch.float32).dtype == torch.float32


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                size = tensor.untyped_storage().nbytes() // tensor.element_size()
                self.entries = max(self.entries, size)
        return result


@pytest.mark.parametrize("name", ["matern32_ard", "sum_of_products", "user_l1", "rff"])
def test_no_tensor_is_larger_than_the_budget(name):
    case, n = CASES[name], 400
    kernel, x = case.kernel(), case.x(n)
    a, b = vectors(n, 2)
    budget = 8 * n * n // 8
    operator = choose_operator(kernel, x, memory_budget=budget)
    with LargestTensor() as largest:
        operator.quadratic_form(a, b, x=x.requires_grad_()).backward()
    assert largest.entries * 8 <= budget


def test_the_form_can_be_differentiated_only_once():
    kernel, x = RBFKernel().double(), gaussian(5, 2, torch.Generator())
    form = TiledOperator(kernel, x).quadratic_form(*vectors(5, 1))
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(form, kernel.raw_lengthscale, create_graph=True)


def test_where_gradients_are_disabled_the_form_is_a_number():
    for name in ("rbf", "user_l1"):
        kernel, x = CASES[name].kernel(), CASES[name].x(5)
        a, b = vectors(5, 1)
        with torch.no_grad():
            form = choose_operator(kernel, x).quadratic_form(a, b)
        assert not form.requires_grad
        torch.testing.assert_close(form, by_autograd(kernel, x, a, b)[0])


def test_arguments_that_do_not_fit_are_refused_by_name():
    x = gaussian(6, 2, torch.Generator())
    operator = TiledOperator(RBFKernel().double(), x)
    a, b = vectors(6, 2)
    with pytest.raises(ValueError, match="square"):
        operator.cross(x[:3]).quadratic_form(a, b)
    with pytest.raises(ValueError, match=r"a must have shape \(6, k\)"):
        operator.quadratic_form(a[:5], b)
    with pytest.raises(ValueError, match=r"b must be torch\.float64"):
        operator.quadratic_form(a, b.float())
    with pytest.raises(ValueError, match="as many columns"):
        operator.quadratic_gradient(a, b[:, :1])
    with pytest.raises(ValueError, match=r"x must be \(6, 2\)"):
        operator.quadratic_form(a, b, x=x[:5])
