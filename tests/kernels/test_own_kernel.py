"""A kernel of one's own: what no other has. It is in CASES, so the rest is tested."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import LinearKernel, ScaleKernel

import sgdgp
from examples.wendland import WendlandKernel
from sgdgp.features import random_features
from tests.models import gp, own_posterior, toy_data


def test_it_is_zero_beyond_its_lengthscale_and_a_covariance_within(generator):
    kernel = WendlandKernel().double()
    x = torch.rand(60, 3, generator=generator, dtype=torch.float64)
    matrix = kernel(x).to_dense().detach()
    far = torch.cdist(x, x) >= kernel.lengthscale
    assert (matrix[far] == 0).all()
    assert (matrix[~far] > 0).all()
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_frequencies_are_those_of_its_dimension(dim, generator):
    kernel = WendlandKernel().double()
    x = torch.rand(12, dim, generator=generator, dtype=torch.float64)
    found = random_features(
        kernel, dim=dim, num_features=200_000, generator=generator, dtype=x.dtype
    ).features(x)
    truth = kernel(x).to_dense().detach()
    torch.testing.assert_close(found @ found.T, truth, rtol=0, atol=5 * 2e5**-0.5)


def test_more_columns_than_three_are_refused():
    with pytest.raises(ValueError, match="up to three columns, found 4"):
        WendlandKernel()(torch.zeros(2, 4)).to_dense()


def test_posteriors_of_it_are_saved_and_loaded(tmp_path):
    model = gp(ScaleKernel(WendlandKernel()) + LinearKernel())
    posterior = sgdgp.condition(model, num_samples=8)
    posterior.save(tmp_path / "wendland")
    again = sgdgp.load(tmp_path / "wendland", model)
    x_new, _ = toy_data(9, seed=1)
    assert torch.equal(posterior.samples(x_new), again.samples(x_new))
    exact, _ = own_posterior(model, x_new)
    torch.testing.assert_close(posterior.mean(x_new), exact, rtol=0, atol=1e-2)
