"""Predictions from outputs and fluctuations, against integrals and enumeration."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sgdgp.networks import predictive
from sgdgp.networks.likelihoods import Categorical, Gaussian

K = 6


def sampled(
    n: int = 9, classes: int = 4, k: int = K, spread: float = 1.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Outputs (n, C), fluctuations (n, C, k) and classes (n,)."""
    generator = torch.Generator().manual_seed(seed)
    f = 2 * torch.randn(n, classes, generator=generator, dtype=torch.float64)
    g = torch.randn(n, classes, k, generator=generator, dtype=torch.float64)
    return f, spread * g, torch.randint(classes, (n,), generator=generator)


def test_variance_is_the_mean_square_about_the_network():
    _, g, _ = sampled()
    torch.testing.assert_close(predictive.variance_of(g), g.square().mean(-1))


def test_probit_agrees_with_the_logistic_normal_integral_of_two_classes():
    """The probit is off by less than 0.02 from E sigmoid(N(mean, variance))."""
    t = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    density = (-0.5 * t.square()).exp() / math.sqrt(2 * math.pi)
    for mean, variance in [(0.5, 1.0), (2.0, 4.0), (-3.0, 9.0)]:
        integral = torch.trapezoid((mean + variance**0.5 * t).sigmoid() * density, t)
        # Scaling both logits alike scales their difference, the logit of two classes.
        f = torch.tensor([[mean, 0.0]], dtype=torch.float64)
        v = torch.full((1, 2), variance, dtype=torch.float64)
        found = float(predictive.probit(f, v)[0, 0])
        assert found == pytest.approx(float(integral), abs=0.02)


@given(seed=st.integers(0, 1000), classes=st.integers(2, 6))
def test_without_fluctuations_every_link_is_the_softmax(seed: int, classes: int):
    f, g, _ = sampled(classes=classes, seed=seed)
    softmax = f.softmax(1)
    torch.testing.assert_close(predictive.probit(f, 0 * f), softmax)
    torch.testing.assert_close(predictive.monte_carlo(f, 0 * g), softmax)
    assert predictive.mutual_information(f, 0 * g).abs().max() < 1e-12


@given(seed=st.integers(0, 1000), shift=st.floats(-1e3, 1e3))
def test_a_shift_of_all_logits_changes_no_probability(seed: int, shift: float):
    f, g, _ = sampled(seed=seed)
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(
        predictive.monte_carlo(f + shift, g), predictive.monte_carlo(f, g), **close
    )
    generator = torch.Generator().manual_seed(seed)
    common = g + shift * torch.randn(K, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        predictive.monte_carlo(f, common), predictive.monte_carlo(f, g), **close
    )
    torch.testing.assert_close(
        predictive.logit_variance(common),
        predictive.logit_variance(g),
        rtol=1e-6,
        atol=1e-6,
    )


def test_monte_carlo_is_the_mean_of_the_samples_probabilities():
    f, g, _ = sampled()
    expected = torch.stack([(f + g[..., k]).softmax(1) for k in range(K)]).mean(0)
    torch.testing.assert_close(predictive.monte_carlo(f, g), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_probabilities_of_hopeless_classes_are_finite(dtype: torch.dtype):
    f = torch.tensor([[3e3, 0.0, -3e3]], dtype=dtype)
    g = torch.zeros(1, 3, K, dtype=dtype)
    for log_p in (predictive.log_probit(f, 0 * f), predictive.log_monte_carlo(f, g)):
        torch.testing.assert_close(
            log_p, torch.tensor([[0.0, -3e3, -6e3]], dtype=dtype)
        )


def test_joint_log_prob_is_the_log_of_the_mean_product():
    f, g, y = sampled(n=5)
    log_probs = Categorical().log_prob(f.unsqueeze(-1) + g, y)
    expected = log_probs.exp().prod(0).mean().log()
    assert predictive.joint_log_prob(log_probs) == pytest.approx(float(expected))


def test_joint_log_prob_of_one_sample_is_the_sum_of_its_log_likelihoods():
    f, _, y = sampled()
    log_probs = Categorical().log_prob(f.unsqueeze(-1), y)
    expected = -float(Categorical().loss(f, y).sum())
    assert predictive.joint_log_prob(log_probs) == pytest.approx(expected)


def test_joint_log_prob_survives_batches_whose_probability_underflows():
    log_probs = torch.full((20_000, 4), -1.0)
    assert predictive.joint_log_prob(log_probs) == pytest.approx(-20_000, rel=1e-9)


def test_joint_density_of_gaussian_samples_tends_to_the_dense_one():
    """Two points with correlated means: log N(y | 0, K + sigma^2 I) by samples."""
    generator = torch.Generator().manual_seed(0)
    k = 200_000
    covariance = torch.tensor([[1.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    root = torch.linalg.cholesky(covariance)
    draws = root @ torch.randn(2, k, generator=generator, dtype=torch.float64)
    y = torch.tensor([0.5, 0.9], dtype=torch.float64)
    log_probs = Gaussian(0.3).log_prob(draws.unsqueeze(1), y)
    dense = torch.distributions.MultivariateNormal(
        torch.zeros(2, dtype=torch.float64), covariance + 0.3 * torch.eye(2)
    )
    found = predictive.joint_log_prob(log_probs)
    weights = log_probs.sum(0).softmax(0)
    error_bar = 4 * math.sqrt(float(k * weights.square().sum() - 1) / k)
    assert found == pytest.approx(float(dense.log_prob(y)), abs=error_bar)


def test_dyadic_joint_log_prob_is_the_mean_over_pairs_and_shares():
    """Two examples are always the same pair; the share is uniform in 1, ..., 9."""
    f, g, y = sampled(n=2)
    log_probs = Categorical().log_prob(f.unsqueeze(-1) + g, y)
    each = [
        predictive.joint_log_prob(
            torch.cat([log_probs[:1].expand(m, K), log_probs[1:].expand(10 - m, K)])
        )
        / 10
        for m in range(1, 10)
    ]
    exact, spread = torch.tensor(each).mean(), torch.tensor(each).std()
    repeats = 2000
    found = predictive.dyadic_joint_log_prob(
        log_probs, torch.Generator().manual_seed(0), repeats=repeats
    )
    error_bar = 4 * float(spread) / math.sqrt(repeats)
    assert found == pytest.approx(float(exact), abs=error_bar)
    assert error_bar < 0.1 * abs(float(exact))


def test_dyadic_shares_are_symmetric():
    """Each sample explains one of two labels only: the score counts the rarer one."""
    log_probs = torch.tensor([[0.0, -100.0], [-100.0, 0.0]], dtype=torch.float64)
    rarer = sum(min(m, 10 - m) for m in range(1, 10)) / 9
    found = predictive.dyadic_joint_log_prob(
        log_probs, torch.Generator().manual_seed(0), repeats=2000
    )
    assert found == pytest.approx(-10 * rarer - math.log(2) / 10, abs=1.2)


def test_dyadic_score_of_one_function_is_the_log_likelihood():
    f, _, y = sampled(n=200)
    log_probs = Categorical().log_prob(f.unsqueeze(-1), y)
    found = predictive.dyadic_joint_log_prob(
        log_probs, torch.Generator().manual_seed(0), repeats=50
    )
    error_bar = 4 * float(log_probs.std()) * math.sqrt(0.27 / (200 * 50))
    assert found == pytest.approx(float(log_probs.mean()), abs=error_bar)


def test_dyadic_score_rewards_consistent_samples_over_their_mean():
    """Samples that each are sure, and right half of the time, know their doubts."""
    log_p = torch.tensor([[1.0, 1e-3], [1.0, 1e-3], [1e-3, 1.0], [1e-3, 1.0]]).log()
    marginal = log_p.logsumexp(1, keepdim=True) - math.log(2)
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert predictive.dyadic_joint_log_prob(
        log_p[:2], draw[0]
    ) > predictive.dyadic_joint_log_prob(marginal[:2], draw[1])


def test_the_same_seed_draws_the_same_pairs():
    f, g, y = sampled(n=31)
    log_probs = Categorical().log_prob(f.unsqueeze(-1) + g, y)
    first, again, other = (
        predictive.dyadic_joint_log_prob(log_probs, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other


def test_scores_that_cannot_be_joint_are_refused():
    generator = torch.Generator()
    with pytest.raises(ValueError, match="at least two examples, found 1"):
        predictive.dyadic_joint_log_prob(torch.zeros(1, 3), generator)
    with pytest.raises(ValueError, match=r"found shape \(0, 3\)"):
        predictive.joint_log_prob(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="found NaN"):
        predictive.joint_log_prob(torch.full((2, 2), math.nan))


def test_entropy_is_that_of_torch_distributions_and_zero_where_sure():
    p = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([math.log(4), 0.0])
    torch.testing.assert_close(predictive.predictive_entropy(p), expected)


def test_mutual_information_of_sure_and_opposed_samples_is_the_log_of_their_number():
    f = torch.zeros(1, 2)
    g = torch.tensor([[[1e3, -1e3], [-1e3, 1e3]]])
    found = predictive.mutual_information(f, g)
    torch.testing.assert_close(found, torch.tensor([math.log(2)]))


@given(seed=st.integers(0, 1000), spread=st.floats(0.01, 10))
def test_mutual_information_lies_between_zero_and_the_entropy(seed: int, spread: float):
    f, g, _ = sampled(seed=seed, spread=spread)
    entropy = predictive.predictive_entropy(predictive.monte_carlo(f, g))
    information = predictive.mutual_information(f, g)
    assert (information >= 0).all()
    assert (information <= entropy + 1e-12).all()
    assert (information <= math.log(K) + 1e-12).all()


def test_gaussian_prediction_adds_noise_to_targets_only():
    mean, variance = torch.zeros(3, 2), torch.ones(3, 2)
    prediction = predictive.GaussianPrediction(mean, variance, (0.5, 3.0))
    expected = torch.tensor([1.5, 4.0]).expand(3, 2)
    torch.testing.assert_close(prediction.target_variance, expected)
    torch.testing.assert_close(prediction.deviation, expected.sqrt())
    y = torch.randn(3, 2)
    normal = torch.distributions.Normal(mean, expected.sqrt())
    torch.testing.assert_close(prediction.log_density(y), normal.log_prob(y).sum(1))
