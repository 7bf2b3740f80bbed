"""Outcome transforms are read as a shift and a scale, or refused."""

from __future__ import annotations

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import ChainedOutcomeTransform, Log, Standardize

import sgdgp
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.gpytorch_adapter import prior_of
from sgdgp.gpytorch_adapter.outcome_scale import affine_of
from tests.models import toy_data


def test_each_output_has_its_own_shift_and_scale():
    y = torch.tensor([[1.0, 50.0], [3.0, 90.0], [8.0, -10.0]])
    transform = Standardize(2)
    transform(y)
    chain = ChainedOutcomeTransform(first=transform, second=Standardize(2))
    chain["second"](torch.tensor([[1.0, 2.0], [5.0, 3.0]]))
    for read in (transform.eval(), chain.eval()):
        shift, scale = affine_of(read, 2, None)
        points = torch.tensor([[-2.0, 0.3]]).double()
        truth = read.untransform(points)[0]
        torch.testing.assert_close(shift + scale * points, truth, rtol=1e-6, atol=0)


def test_a_transform_of_one_output_serves_several():
    transform = Standardize(1)
    transform(torch.tensor([[1.0], [3.0], [8.0]]))
    shift, scale = affine_of(transform.eval(), 3, None)
    torch.testing.assert_close(shift, torch.full((3,), 4.0).double())
    assert scale.unique().numel() == 1


def test_a_large_shift_in_float32_does_not_hide_the_scale():
    x, y = toy_data(30, dtype=torch.float32)
    targets = 3e4 + 0.5 * y[:, None]
    model = SingleTaskGP(x, targets)
    units = prior_of(model, x).outcome_scale
    assert units.scale == pytest.approx(float(targets.std()), rel=1e-5)
    assert units.shift == pytest.approx(float(targets.mean()), rel=1e-6)


def test_transforms_that_are_not_affine_are_refused():
    x, y = toy_data(30)
    model = SingleTaskGP(x, y[:, None].exp(), outcome_transform=Log())
    with pytest.raises(UnsupportedModelError, match="Log is not affine"):
        sgdgp.condition(model)
