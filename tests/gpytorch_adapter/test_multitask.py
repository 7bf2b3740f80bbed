"""A kernel of several outputs is a kernel over pairs of input and task."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.kernels import LinearKernel, MultitaskKernel, RBFKernel, RBFKernelGrad

from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter import (
    MultitaskPrior,
    multitask_inputs,
    prior_of,
    traced_prior,
)
from sgdgp.gpytorch_adapter.multitask import multitask_kernel
from sgdgp.operators import tile_kernel
from tests.models import (
    MULTITASK_KERNELS,
    MultitaskGP,
    multitask_data,
    multitask_gp,
    uneven,
)

KERNELS = pytest.mark.parametrize("name", MULTITASK_KERNELS)


@KERNELS
def test_the_kernel_over_pairs_is_the_multitask_kernel(name):
    kernel = uneven(MULTITASK_KERNELS[name]())
    x, _ = multitask_data(10)
    truth = kernel(x).to_dense()
    columns = x if kernel.active_dims is None else x[:, kernel.active_dims]
    pairs = multitask_inputs(columns, 3)
    ours = multitask_kernel(kernel, columns.shape[1])
    torch.testing.assert_close(ours(pairs).to_dense(), truth, rtol=0, atol=1e-8)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        ours(pairs[order], pairs[:7]).to_dense(), truth[order][:, :7]
    )


@KERNELS
def test_it_shares_the_parameters(name):
    kernel = MULTITASK_KERNELS[name]()
    ours = set(map(id, multitask_kernel(kernel, 2).parameters()))
    assert ours == set(map(id, kernel.parameters()))


@KERNELS
def test_it_has_a_tile_form(name):
    assert tile_kernel(multitask_kernel(MULTITASK_KERNELS[name](), 2)) is not None


@KERNELS
def test_the_traced_prior_is_the_models_own_with_its_gradient(name):
    model = multitask_gp(MULTITASK_KERNELS[name]()).train()
    distribution = model(model.train_inputs[0])
    rows = torch.tensor([0, 4, 5, 30, 71])
    traced = traced_prior(distribution, rows)
    truth = distribution.covariance_matrix[rows][:, rows]
    ours = traced.kernel(traced.inputs).to_dense()
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    torch.testing.assert_close(traced.mean, distribution.loc[rows])
    weights = torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()
    parameters = list(model.parameters())
    expected, found = (
        torch.autograd.grad((weights * k).sum(), parameters, allow_unused=True)
        for k in (truth, ours)
    )
    for one, other in zip(expected, found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(other, one, rtol=1e-9, atol=1e-12)


def test_pairs_are_ordered_as_gpytorch_orders_outputs():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    expected = [[1, 2, 0], [1, 2, 1], [1, 2, 2], [3, 4, 0], [3, 4, 1], [3, 4, 2]]
    assert multitask_inputs(x, 3).tolist() == expected


def test_the_prior_takes_pairs_in_any_order():
    model = multitask_gp()
    x, _ = multitask_data(6, seed=3)
    prior = prior_of(model, x)
    assert isinstance(prior, MultitaskPrior)
    assert prior.num_outputs == 3
    own = gpytorch.Module.__call__(model.eval(), x)
    pairs = multitask_inputs(x, 3)
    order = torch.randperm(18, generator=torch.Generator().manual_seed(0))[:11]
    mean, inputs = prior.evaluate(pairs[order])
    torch.testing.assert_close(mean, own.loc[order].detach())
    torch.testing.assert_close(
        prior.kernel(inputs).to_dense(),
        own.covariance_matrix[order][:, order].detach(),
    )
    noise = model.likelihood.task_noises + model.likelihood.noise
    torch.testing.assert_close(
        prior.noise(pairs[order]), noise.repeat(6)[order].detach()
    )


def test_a_network_in_front_of_a_multitask_kernel_is_traced():
    model = multitask_gp(covariance=lambda m, x: 2.0 * m.kernel(m.net(x)), net=net())
    x, _ = multitask_data(6, seed=3)
    prior = prior_of(model, x)
    own = gpytorch.Module.__call__(model.eval(), x)
    _, inputs = prior.evaluate(multitask_inputs(x, 3))
    torch.testing.assert_close(
        prior.kernel(inputs).to_dense(), own.covariance_matrix.detach()
    )


def net():
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Tanh())


def refused_kernel_of_derivatives():
    x, _ = multitask_data(10)
    kernel = RBFKernelGrad()
    return MultitaskGP(x, torch.zeros(10, 3), kernel).double()


class OtherMultitask(MultitaskKernel):
    """Overrides what it computes."""

    def forward(self, x1, x2, diag=False, **params):
        return super().forward(x1, x2, diag=diag, **params) * 2.0


def refused_subclass():
    x, y = multitask_data(10)
    return MultitaskGP(x, y, OtherMultitask(RBFKernel(), 3)).double()


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (refused_kernel_of_derivatives, "RBFKernelGrad has several outputs"),
        (refused_subclass, "OtherMultitask has several outputs"),
    ],
)
def test_kernels_that_are_not_over_pairs_are_refused_by_name(build, named):
    with pytest.raises(UnsupportedModelError, match=named):
        prior_of(build(), multitask_data(10)[0])


def test_a_product_with_a_linear_kernel_is_not_sent_through_a_root():
    kernel = uneven(MultitaskKernel(LinearKernel(), 3))
    x, _ = multitask_data(10)
    ours = multitask_kernel(kernel, 2)
    pairs = multitask_inputs(x, 3)
    data = kernel.data_covar_module(x).to_dense()
    truth = torch.kron(data, kernel.task_covar_module._eval_covar_matrix())
    # Different points: GPyTorch evaluates equal ones through root decompositions.
    found = ours(pairs, pairs[:29]).to_dense()
    torch.testing.assert_close(found, truth[:, :29])
