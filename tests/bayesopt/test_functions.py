"""What maximising knows of a posterior: data and lengthscales in the user's units."""

from __future__ import annotations

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel

import sgdgp
from sgdgp.bayesopt.functions import source_of
from tests.models import GP

X = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).double()
X = X * torch.tensor([10.0, 1.0]) + 3
Y = 100 + 7 * torch.sin(X[:, 0])


def source(model):
    return source_of(
        sgdgp.condition(model, num_samples=2, num_features=32, progress=False)
    )


def kernel(**settings):
    found = MaternKernel(ard_num_dims=2, **settings)
    found.lengthscale = torch.tensor([0.5, 0.25])
    return found


def test_data_and_lengthscales_are_those_of_the_model():
    found = source(GP(X, Y, ScaleKernel(kernel())).double())
    torch.testing.assert_close(found.x, X)
    torch.testing.assert_close(found.y, Y)
    torch.testing.assert_close(found.lengthscale, torch.tensor([0.5, 0.25]).double())


def test_transforms_of_inputs_and_outcomes_are_undone():
    model = SingleTaskGP(
        X,
        Y.unsqueeze(1),
        covar_module=ScaleKernel(kernel()),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    )
    found = source(model)
    torch.testing.assert_close(found.y, Y)
    spread = X.amax(0) - X.amin(0)
    expected = torch.tensor([0.5, 0.25]).double() * spread
    torch.testing.assert_close(found.lengthscale, expected)


def test_the_smallest_lengthscale_of_several_parts_counts():
    short = RBFKernel(active_dims=[1])
    short.lengthscale = 0.1
    found = source(GP(X, Y, ScaleKernel(kernel()) + short).double())
    torch.testing.assert_close(found.lengthscale, torch.tensor([0.5, 0.1]).double())


@pytest.mark.parametrize("part", [LinearKernel, lambda: RBFKernel(active_dims=[0])])
def test_inputs_without_a_lengthscale_are_left_to_the_box(part):
    found = source(GP(X, Y, ScaleKernel(part())).double()).lengthscale
    assert found is None or not bool(torch.isfinite(found[1]))
