"""The index kernel's features are exact, alone and in products."""

from __future__ import annotations

import pytest
import torch
from botorch.models.kernels.positive_index import PositiveIndexKernel
from gpytorch.kernels import IndexKernel

from sgdgp.features import has_features
from tests.features.kernels import (
    PRODUCTS_WITH_TABLES,
    TABLES,
    features,
    points,
    products_with_tables,
    rbf,
    tasks,
)
from tests.models import uneven


@pytest.mark.parametrize("name", TABLES)
def test_kernel_of_the_features_is_the_kernel(name):
    kernel, x, z = TABLES[name](), tasks(12), tasks(9, seed=1)
    phi = features(kernel, 1)
    assert phi.exact
    truth = kernel(x, z).to_dense().detach()
    torch.testing.assert_close(phi.features(x) @ phi.features(z).T, truth)


def test_a_product_with_a_stationary_kernel_has_few_features():
    task = uneven(IndexKernel(4, rank=2, active_dims=[2]))
    data = rbf(2)
    data.active_dims = torch.tensor([0, 1])
    x = torch.cat([points(8, 2, 3), tasks(8)], dim=1)
    kernel = (data * task).double()
    maps = [features(kernel, 3, 512, seed) for seed in range(40)]
    assert maps[0].num_features == 4 * 512
    grams = torch.stack([phi.features(x) @ phi.features(x).T for phi in maps])
    # The mean of 40 maps of 256 frequencies, against five standard errors.
    error = (grams.mean(0) - kernel(x).to_dense().detach()).abs()
    bound = 5.0 * grams.std(0) / len(maps) ** 0.5 + 1e-9
    assert bool((error < bound).all())


@pytest.mark.parametrize("name", PRODUCTS_WITH_TABLES)
def test_a_product_with_a_table_has_no_error_in_its_variance(name):
    kernel = uneven(products_with_tables()[name])
    x = torch.cat([points(11, 2, 3), tasks(11)], dim=1)
    variance = features(kernel, 3, 64).features(x).square().sum(1)
    truth = kernel(x).to_dense().diagonal()
    torch.testing.assert_close(variance, truth, rtol=1e-6, atol=0)


def test_points_that_require_a_gradient_get_zero():
    phi, x = features(TABLES["rank 4"](), 1), tasks(5).requires_grad_()
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
    phi = features(TABLES["rank 1"](), 1)
    with pytest.raises(ValueError, match="tasks from 0 to 3"):
        phi.features(torch.tensor([[task]], dtype=torch.float64))
