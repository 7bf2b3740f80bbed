"""Prior function draws, from random features and revealed point by point."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    PiecewisePolynomialKernel,
    RBFKernel,
    ScaleKernel,
)

from sgdgp.features import ExactDraws, NoRandomFeatures, draw_prior
from sgdgp.features.prior_draws import _normal_columns
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


@pytest.mark.parametrize("rows", [5, 16, 17, 64])
def test_normals_drawn_together_are_those_drawn_column_by_column(rows):
    like, one, other = torch.empty(0), *(torch.Generator() for _ in range(2))
    columns = [
        torch.randn(rows, generator=one.manual_seed(3), dtype=torch.float64),
        *(torch.randn(rows, generator=one, dtype=torch.float64) for _ in range(2)),
    ]
    found = _normal_columns((rows, 3), other.manual_seed(3), like)
    assert torch.equal(found, torch.stack(columns, 1).float())
    assert torch.equal(one.get_state(), other.get_state())


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


def test_pickles_draw_the_weights_again(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    found = draw_prior(rbf(2), 70, dim=2, num_features=4096, generator=generator)
    content = pickle.dumps(found)
    assert len(content) < 0.2 * 70 * 4096 * 4
    for one, other in zip(found, pickle.loads(content), strict=True):
        assert torch.equal(one.weights, other.weights)
    # Of chosen columns no generator knows.
    some, x = found.subset([3, 66]), points(4, 2).float()
    assert torch.equal(pickle.loads(pickle.dumps(some))(x), some(x))
    monkeypatch.setattr(
        "sgdgp.features.prior_draws._normal_columns",
        lambda shape, generator, like: torch.zeros(shape).to(like),
    )
    with pytest.raises(RuntimeError, match="draws other random numbers"):
        pickle.loads(content)


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
    assert exact_draws(rbf(2), 0, points(4, 2))(points(3, 2)).shape == (3, 0)
    assert exact_draws(rbf(2), 5, points(0, 2))(points(0, 2)).shape == (0, 5)


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


def exact_draws(kernel, num_samples, x, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return ExactDraws(kernel, num_samples, x, generator=generator, **settings)


def piecewise():
    kernel = ScaleKernel(PiecewisePolynomialKernel(q=2))
    kernel.base_kernel.lengthscale = 3.0
    kernel.outputscale = 1.7
    return kernel


@pytest.mark.parametrize("make", [piecewise, lambda: matern(1.5, 2)])
def test_covariance_over_several_visits_is_that_of_the_prior(make):
    kernel, x = make(), points(15, 2)
    prior = exact_draws(kernel, 4096, x[:5])
    values = torch.cat([prior(x[:5]), prior(x[5:12]), prior(x[12:])])
    exact = dense(kernel, x)
    variance = exact.diagonal()
    assert (values.mean(1) / (variance / 4096).sqrt()).abs().max() < 4.0
    standard_error = ((exact**2 + variance[:, None] * variance) / 4096).sqrt()
    error = (values @ values.T / 4096 - exact) / standard_error
    assert error.abs().max() < 4.5
    assert error.square().mean() < 2.5


def test_factor_grown_in_steps_is_the_factor_of_the_whole():
    kernel, x = matern(0.5, 2), points(20, 2)
    prior = exact_draws(kernel, 3, x[:8])
    prior(x[8:9])
    prior(x[9:])
    whole = torch.linalg.cholesky(dense(kernel, x))
    torch.testing.assert_close(prior._factor, whole, rtol=0, atol=1e-8)
    torch.testing.assert_close(prior(x), prior._factor @ prior._normals)


def test_visited_points_keep_their_values():
    x = points(10, 2)
    prior = exact_draws(piecewise(), 3, x[:4])
    first = prior(x[:4])
    later = prior(x)
    assert torch.equal(later[:4], first)
    order = torch.tensor([7, 0, 7, 3])
    assert torch.equal(prior(x[order]), later[order])
    assert prior.num_points == 10


def test_repeated_points_are_revealed_once():
    x = points(4, 2)
    zero = torch.zeros(1, 2, dtype=torch.float64)
    prior = exact_draws(piecewise(), 3, torch.cat([x, x, zero, -zero]))
    assert prior.num_points == 5
    values = prior(torch.cat([zero, -zero]))
    assert torch.equal(values[0], values[1])


def test_draws_do_not_depend_on_what_else_uses_the_generator():
    x = points(8, 2)
    values = []
    for distract in (False, True):
        generator = torch.Generator().manual_seed(3)
        prior = ExactDraws(piecewise(), 2, x[:4], generator=generator)
        if distract:
            torch.randn(100, generator=generator)
        values.append(prior(x))
    assert torch.equal(*values)
    assert not torch.allclose(values[0], exact_draws(piecewise(), 2, x[:4], seed=4)(x))


def test_later_changes_of_the_kernel_do_not_reach_the_draws():
    x, kernel = points(12, 2), piecewise()
    same = exact_draws(kernel, 2, x[:6])
    changed = exact_draws(kernel, 2, x[:6])
    expected = same(x)
    kernel.outputscale = 40.0
    assert torch.equal(changed(x), expected)
    assert kernel.raw_outputscale.dtype == torch.float32
    assert kernel.raw_outputscale.requires_grad


def test_singular_covariance_is_factorised_with_jitter():
    """Points so close that float64 cannot tell their rows apart."""
    x = torch.linspace(0, 1, 200, dtype=torch.float64)[:, None]
    kernel = RBFKernel()
    prior = exact_draws(kernel, 500, x)
    near = x[:50] + 1e-7
    torch.testing.assert_close(prior(near), prior(x[:50]), rtol=0, atol=1e-3)
    covariance = prior(x) @ prior(x).T / 500
    assert (covariance - dense(kernel, x)).abs().max() < 0.3


def test_float32_points_give_float32_values():
    x = points(6, 2).float()
    prior = exact_draws(piecewise(), 3, x)
    values = prior(x)
    assert values.dtype == prior.dtype == torch.float32
    double = exact_draws(piecewise(), 3, x.double())(x.double())
    torch.testing.assert_close(values.double(), double, rtol=0, atol=1e-5)


def test_more_points_than_the_limit_are_refused_before_any_work():
    x = points(12, 2)
    with pytest.raises(NoRandomFeatures, match="12 points, more than max_points=10"):
        exact_draws(piecewise(), 2, x, max_points=10)
    prior = exact_draws(piecewise(), 2, x[:8], max_points=10)
    with pytest.raises(NoRandomFeatures, match=r"@register_features\(Piecewise"):
        prior(x)
    assert prior.num_points == 8
    assert prior(x[:8]).shape == (8, 2)


def test_gradients_are_refused():
    prior = exact_draws(piecewise(), 2, points(4, 2))
    with pytest.raises(ValueError, match="no closed-form gradient"):
        prior(points(4, 2).requires_grad_())


def test_bad_points_are_refused():
    prior = exact_draws(piecewise(), 2, points(4, 2))
    with pytest.raises(ValueError, match=r"shape \(n, 2\)"):
        prior(points(4, 3))
    with pytest.raises(TypeError, match="dtype"):
        prior(points(4, 2).float())
    with pytest.raises(ValueError, match="found 1 NaN"):
        prior(torch.tensor([[0.0, float("nan")]], dtype=torch.float64))
