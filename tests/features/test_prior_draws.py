"""Prior function draws from random features."""

from __future__ import annotations

import math

import pytest
import torch
from gpytorch.kernels import LinearKernel, PiecewisePolynomialKernel, RBFKernel

from sgdgp.features import NoRandomFeatures, draw_prior
from tests.features.kernels import dense, matern, points, rbf


def draws(kernel, num_samples, dim=3, seed=0, dtype=torch.float64, **settings):
    return draw_prior(
        kernel.double(),
        num_samples,
        dim=dim,
        generator=torch.Generator().manual_seed(seed),
        dtype=dtype,
        **settings,
    )


@pytest.mark.parametrize(
    "kernel", [matern(1.5, 3), rbf(3) + LinearKernel()], ids=["matern", "sum"]
)
def test_mean_and_covariance_of_4096_draws_are_those_of_the_prior(kernel):
    x = points(12, 3)
    prior = draws(kernel, 4096, num_features=256)
    values, exact = prior(x), dense(kernel, x)
    assert values.shape == (12, 4096)
    variance = exact.diagonal()
    mean_error = values.mean(1) / (variance / 4096).sqrt()
    assert mean_error.abs().max() < 4.0
    # Var of a product of two normals, and the error of 64 maps of 256 features.
    outer = variance[:, None] * variance
    standard_error = ((exact**2 + outer) / 4096 + outer / (64 * 128)).sqrt()
    covariance_error = (values @ values.T / 4096 - exact) / standard_error
    assert covariance_error.abs().max() < 4.5
    assert covariance_error.square().mean() < 2.5


def test_groups_have_maps_of_their_own():
    prior = draws(rbf(3), 10, num_features=8, group_size=4)
    assert [group.weights.shape[1] for group in prior.groups] == [4, 4, 2]
    frequencies = [group.feature_map.frequencies for group in prior]
    assert not torch.allclose(frequencies[0], frequencies[1])
    assert prior.num_samples == 10
    x = points(5, 3)
    torch.testing.assert_close(
        prior(x), torch.cat([group(x) for group in prior.groups], 1)
    )


def test_error_of_the_features_averages_out_over_groups():
    """Two points at k = 0: the same 512 draws from one map, and from 64 maps."""
    x = torch.tensor([[0.0] * 3, [50.0] * 3], dtype=torch.float64)

    def feature_error(group_size):
        prior = draws(rbf(3), 512, num_features=8, group_size=group_size)
        kernels = [(p := g.feature_map.features(x)) @ p.T for g in prior.groups]
        return float(torch.stack(kernels).mean(0)[0, 1].abs())

    assert feature_error(8) < 4.5 / math.sqrt(2 * 4 * 64)
    assert feature_error(512) > feature_error(8)


def test_more_samples_begin_with_the_same_functions():
    x = points(6, 3)
    few, many = (draws(rbf(3), s, num_features=16)(x) for s in (5, 70))
    torch.testing.assert_close(few, many[:, :5])


def test_same_seed_same_functions_and_other_seed_others():
    x = points(6, 3)
    a, b, c = (draws(rbf(3), 3, num_features=16, seed=s)(x) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.allclose(a, c)


def test_float32_draws_are_the_float64_draws_rounded():
    x = points(6, 3)
    single = draws(rbf(3), 4, num_features=64, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single(x.float()).double(),
        draws(rbf(3), 4, num_features=64)(x),
        rtol=0,
        atol=1e-4,
    )


def test_values_do_not_depend_on_the_batch():
    x, prior = points(50, 3), draws(matern(2.5, 3), 4, num_features=64)
    torch.testing.assert_close(prior(x)[20:30], prior(x[20:30]))


def test_gradient_agrees_with_finite_differences():
    prior = draws(matern(2.5, 3), 5, num_features=16, group_size=2)
    assert torch.autograd.gradcheck(prior, (points(4, 3).requires_grad_(),))


def test_no_samples_and_no_points_are_empty():
    assert draws(rbf(3), 0)(points(4, 3)).shape == (4, 0)
    assert draws(rbf(3), 5, num_features=8)(points(0, 3)).shape == (0, 5)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_samples: expected at least 0"):
        draws(rbf(3), -1)
    with pytest.raises(ValueError, match="group_size: expected at least 1"):
        draws(rbf(3), 4, group_size=0)
    with pytest.raises(NoRandomFeatures, match="PiecewisePolynomialKernel"):
        draws(PiecewisePolynomialKernel(), 4)
    prior = draws(RBFKernel(), 2, num_features=8)
    with pytest.raises(ValueError, match=r"shape \(n, 3\), found shape \(4, 2\)"):
        prior(points(4, 2))
    with pytest.raises(TypeError, match=r"dtype torch\.float64, found"):
        prior(points(4, 3).float())
