"""The index kernel's features are exact, alone and in products."""

from __future__ import annotations

import pytest
import torch
from botorch.models.kernels.positive_index import PositiveIndexKernel
from gpytorch.kernels import IndexKernel, LinearKernel, ScaleKernel

from sgdgp.features import has_features, random_features
from sgdgp.gpytorch_adapter.multitask import on_columns
from tests.features.kernels import rbf
from tests.models import uneven


def tasks(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 4, (n, 1), generator=generator).double()


def features(kernel, dim=1, count=4, seed=0):
    return random_features(
        kernel.double(),
        dim=dim,
        num_features=count,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )


KERNELS = {
    "rank 1": lambda: uneven(IndexKernel(4, rank=1)),
    "rank 4": lambda: uneven(IndexKernel(4, rank=4)),
    "scaled": lambda: uneven(ScaleKernel(IndexKernel(4, rank=2))),
    "positive": lambda: PositiveIndexKernel(4, rank=2).double(),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernel_of_the_features_is_the_kernel(name):
    kernel, x, z = KERNELS[name](), tasks(12), tasks(9, seed=1)
    phi = features(kernel)
    assert phi.exact
    truth = kernel(x, z).to_dense().detach()
    torch.testing.assert_close(phi.features(x) @ phi.features(z).T, truth)


@pytest.mark.parametrize("name", KERNELS)
def test_products_with_features_are_those_of_the_matrix(name):
    phi, x = features(KERNELS[name]()), tasks(12)
    generator = torch.Generator().manual_seed(3)
    w = torch.randn(phi.num_features, 2, generator=generator, dtype=torch.float64)
    v = torch.randn(12, 2, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(phi.forward(x, w), phi.features(x) @ w)
    torch.testing.assert_close(phi.adjoint(x, v), phi.features(x).T @ v)


def test_a_product_with_a_stationary_kernel_has_few_features():
    task = uneven(IndexKernel(4, rank=2, active_dims=[2]))
    data = rbf(2)
    data.active_dims = torch.tensor([0, 1])
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([x, tasks(8)], dim=1)
    kernel = (data * task).double()
    maps = [features(kernel, dim=3, count=512, seed=seed) for seed in range(40)]
    assert maps[0].num_features == 4 * 512
    grams = torch.stack([phi.features(x) @ phi.features(x).T for phi in maps])
    # The mean of 40 maps of 256 frequencies, against five standard errors.
    error = (grams.mean(0) - kernel(x).to_dense().detach()).abs()
    bound = 5.0 * grams.std(0) / len(maps) ** 0.5 + 1e-9
    assert bool((error < bound).all())


def products():
    data = rbf(2)
    data.active_dims = torch.tensor([0, 1])
    task = uneven(IndexKernel(4, rank=2, active_dims=[2]))
    other = uneven(IndexKernel(4, rank=1, active_dims=[2]))
    linear = LinearKernel(active_dims=[0])
    yield "stationary", data * task
    yield "first", task * data
    yield "scaled", ScaleKernel(task) * ScaleKernel(data)
    yield "two tables", task * data * other
    yield "tables alone", task * other
    yield "sum", (data + linear) * task
    yield "three", linear * task * data
    inner = rbf(1) * IndexKernel(4, active_dims=[0])
    inner.kernels[0].active_dims = torch.tensor([1])
    yield "nested", ScaleKernel(on_columns(inner, torch.tensor([2, 0]))) + data


@pytest.mark.parametrize("name", dict(products()))
def test_the_parts_of_a_product_agree(name):
    kernel = uneven(dict(products())[name])
    phi = features(kernel, dim=3, count=64)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    x = torch.cat([x, tasks(11)], dim=1).requires_grad_()
    w = torch.randn(phi.num_features, 3, generator=generator, dtype=torch.float64)
    v = torch.randn(11, 3, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(phi.forward(x, w), phi.features(x) @ w)
    torch.testing.assert_close(phi.adjoint(x, v), phi.features(x).T @ v)
    one, other = (
        torch.autograd.grad((v * value).sum(), x)[0]
        for value in (phi.forward(x, w), phi.features(x) @ w)
    )
    torch.testing.assert_close(one, other)
    assert phi.forward(x[:0], w).shape == (0, 3)
    # Stationary parts have exact variances for every draw of their frequencies.
    variance = phi.features(x).square().sum(1)
    truth = kernel(x).to_dense().diagonal()
    torch.testing.assert_close(variance, truth, rtol=1e-6, atol=0)


def test_points_that_require_a_gradient_get_zero():
    phi, x = features(KERNELS["rank 4"]()), tasks(5).requires_grad_()
    phi.forward(x, torch.ones(4, 1, dtype=torch.float64)).sum().backward()
    assert torch.equal(x.grad, torch.zeros(5, 1, dtype=torch.float64))


class Other(IndexKernel):
    """Computes something else."""

    def forward(self, i1, i2, **params):
        return super().forward(i1, i2, **params).mul(2.0)


def test_a_subclass_with_another_forward_has_none():
    assert has_features(PositiveIndexKernel(4, rank=2))
    assert not has_features(Other(4))


@pytest.mark.parametrize("task", [-1.0, 4.0])
def test_tasks_that_are_not_in_the_table_are_refused(task):
    phi = features(KERNELS["rank 1"]())
    with pytest.raises(ValueError, match="tasks from 0 to 3"):
        phi.features(torch.tensor([[task]], dtype=torch.float64))
