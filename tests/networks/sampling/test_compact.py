"""A compact Gaussian has the moments of its draws, and densities as they are dense."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal, kl_divergence

from sgdgp.networks import Gaussian, Isotropic, linearise
from sgdgp.networks.sampling import CompactGaussian, Draws, SymmetryGroup, align
from sgdgp.tangent import Tangent

D, K = 7, 40


def correlated(draws: int = K, size: int = D, seed: int = 0) -> Tensor:
    """Draws of correlated weights of different scales."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    z = torch.randn(draws, size, generator=generator, dtype=torch.float64)
    return 3.0 + z @ (torch.eye(size) + 0.5 * mixing).double() * torch.arange(
        1, size + 1
    )


def dense(gaussian: CompactGaussian) -> MultivariateNormal:
    factors = gaussian.factors
    covariance = gaussian.remainder.diag() + factors @ factors.mT
    return MultivariateNormal(gaussian.mean, covariance)


KINDS = [
    {"covariance": "diagonal"},
    {"covariance": "low_rank", "rank": 3},
    {"covariance": "full"},
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("draws", [5, K])
def test_means_and_variances_are_those_of_the_draws(kind: dict, draws: int):
    rows = correlated(draws)
    found = CompactGaussian.of(rows, **kind)
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.marginal_variance, rows.var(0))
    torch.testing.assert_close(found.standard_deviation, rows.std(0))


@pytest.mark.parametrize("kind", KINDS)
def test_densities_and_divergences_are_the_dense_ones(kind: dict):
    found = CompactGaussian.of(correlated(), **kind)
    other = CompactGaussian.of(correlated(seed=1), "low_rank", rank=2)
    held_out = correlated(seed=2)
    torch.testing.assert_close(
        found.log_density(held_out), dense(found).log_prob(held_out)
    )
    for p, q in ((found, other), (other, found)):
        expected = float(kl_divergence(dense(p), dense(q)))
        assert p.divergence(q) == pytest.approx(expected, rel=1e-9)
    assert found.divergence(found) == pytest.approx(0.0, abs=1e-9)


def test_a_full_covariance_without_shrinkage_is_the_empirical_one():
    rows = correlated()
    found = CompactGaussian.of(rows, "full", shrinkage=0.0)
    covariance = found.remainder.diag() + found.factors @ found.factors.mT
    torch.testing.assert_close(covariance, rows.mT.cov(), rtol=1e-9, atol=1e-9)
    assert found.warnings == ()


def test_all_factors_of_a_low_rank_are_the_leading_directions_of_the_draws():
    rows = correlated()
    found = CompactGaussian.of(rows, "low_rank", rank=2)
    values, vectors = torch.linalg.eigh(rows.mT.cov())
    leading = vectors[:, -2:] @ values[-2:].diag() @ vectors[:, -2:].mT
    torch.testing.assert_close(found.factors @ found.factors.mT, leading)


def test_shrinkage_is_that_of_the_double_sum_over_pairs():
    rows = correlated(6)
    z = (rows - rows.mean(0)) / rows.std(0)
    products = z[:, :, None] * z[:, None, :]
    variance = products.var(0) * 6**2 / 5**2 / 6
    pairs = ~torch.eye(D, dtype=torch.bool)
    squares = rows.mT.corrcoef()[pairs].square().sum()
    expected = float(variance[pairs].sum() / squares)
    found = CompactGaussian.of(rows, "full")
    assert 0 < expected < 1
    torch.testing.assert_close(found.remainder, expected * rows.var(0))


def test_fewer_draws_than_weights_have_a_density_and_a_caveat():
    rows = correlated(5)
    found = CompactGaussian.of(rows, "full")
    assert bool(found.log_density(rows).isfinite().all())
    assert "5 draws of 7 weights were shrunk" in str(found)
    singular = CompactGaussian.of(rows, "full", shrinkage=0.0)
    samples = singular.sample(9) - rows.mean(0)
    assert int(torch.linalg.matrix_rank(samples)) == 4
    with pytest.raises(ValueError, match="no more draws than weights have a singular"):
        singular.log_density(rows)


@pytest.mark.parametrize("kind", KINDS)
def test_samples_have_the_moments(kind: dict):
    found = CompactGaussian.of(correlated(), **kind)
    samples = found.sample(40000, seed=3)
    again = CompactGaussian.of(samples, "full", shrinkage=0.0)
    # The divergence of a fit with p moments to n samples is about p / 2 n.
    assert again.divergence(found) < (D + D * (D + 1) / 2) / 40000
    torch.testing.assert_close(samples[:3], found.sample(40000, seed=3)[:3])


def test_a_symmetry_moves_moments_as_it_moves_draws():
    rows = correlated()
    order = torch.randperm(D, generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([1.0, -1, 1, 2, -0.5, 1, -1], dtype=torch.float64)

    def action(weights: Tensor) -> Tensor:
        return weights[:, order] * factor

    for kind in KINDS:
        moved = CompactGaussian.of(rows, **kind).mapped(action)
        direct = CompactGaussian.of(action(rows), **kind)
        torch.testing.assert_close(moved.mean, direct.mean)
        torch.testing.assert_close(moved.marginal_variance, direct.marginal_variance)
        if kind["covariance"] != "low_rank":  # scales change leading directions
            assert moved.divergence(direct) == pytest.approx(0.0, abs=1e-8)


def perceptron(inputs: int = 3, outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return (
        nn.Sequential(nn.Linear(inputs, 4), nn.Tanh(), nn.Linear(4, outputs))
        .double()
        .eval()
    )


def test_the_mean_network_is_a_copy_with_the_means():
    network = perceptron()
    before = {name: p.clone() for name, p in network.named_parameters()}
    rows = torch.stack([nn.utils.parameters_to_vector(network.parameters())] * 2)
    rows[1] += 2.0
    found = CompactGaussian.of(rows.detach()).mean_network(network)
    for name, p in found.named_parameters():
        torch.testing.assert_close(p, before[name] + 1.0)
    for name, p in network.named_parameters():
        assert torch.equal(p, before[name])
    with pytest.raises(ValueError, match=r"expected one of \(26,\) weights, found 31"):
        CompactGaussian.of(rows.detach()).mean_network(perceptron(outputs=3))


def test_aligned_draws_have_the_moments_that_were_scrambled():
    network = perceptron()
    group = SymmetryGroup.of(network)
    theta = nn.utils.parameters_to_vector(network.parameters()).detach()
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 20, len(theta), generator=generator, dtype=theta.dtype)
    tangent = Tangent(network)
    own = Draws(theta + 0.02 * noise, tangent.names, [*map(tuple, tangent.shapes)])
    scrambled = replace(
        own, weights=group.sample(1, 40).apply(own.flat).view_as(own.weights)
    )
    aligned, _ = align(scrambled, group, theta)
    found, expected = CompactGaussian.of(aligned), CompactGaussian.of(own)
    torch.testing.assert_close(found.mean, expected.mean)
    torch.testing.assert_close(found.marginal_variance, expected.marginal_variance)
    # Of a Gaussian as of its draws.
    one = group.sample(2)
    moved = CompactGaussian.of(own, "low_rank").mapped(one.apply)
    assert float((moved.mean - theta).abs().max()) > 0.1
    back = moved.aligned(theta, group)
    assert back.divergence(CompactGaussian.of(own, "low_rank")) < 1e-8
    x = torch.randn(5, 3, dtype=theta.dtype)
    torch.testing.assert_close(
        moved.mean_network(network)(x), back.mean_network(network)(x)
    )


def test_a_linearised_posterior_has_its_exact_variances():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(30, 3, generator=generator, dtype=torch.float64)
    y = torch.randn(30, 2, generator=generator, dtype=torch.float64)
    network = perceptron()
    settings = {"steps": 0, "precision": 2.0, "final_samples": 400, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        posterior = linearise(network, Gaussian(0.25), Isotropic()).fit(
            [(x, y)], **settings
        )
    jacobian = posterior.tangent.at(x).jacobian().flatten(0, 1)
    precision = jacobian.mT @ jacobian / 0.25 + 2.0 * torch.eye(jacobian.shape[1])
    expected = precision.double().inverse().diagonal()
    found = CompactGaussian.of_posterior(posterior)
    torch.testing.assert_close(found.marginal_variance, expected)
    theta = nn.utils.parameters_to_vector(network.parameters())
    torch.testing.assert_close(found.mean, theta.detach())
    sampled = CompactGaussian.of_posterior(posterior, "low_rank").marginal_variance
    assert float((sampled / expected).log().abs().max()) < 5 * math.sqrt(2 / 400)


def test_bad_input_is_refused():
    rows = correlated()
    with pytest.raises(ValueError, match="one network has no variance"):
        CompactGaussian.of(rows[:1])
    with pytest.raises(ValueError, match="covariance: expected"):
        CompactGaussian.of(rows, "block")
    with pytest.raises(ValueError, match="rank: expected at most 3 with 5 draws"):
        CompactGaussian.of(rows[:5], "low_rank", rank=4)
    with pytest.raises(ValueError, match="rank: a diagonal covariance has none"):
        CompactGaussian.of(rows, rank=4)
    with pytest.raises(ValueError, match="draws: a low rank takes three different"):
        CompactGaussian.of(rows[:2].repeat(3, 1), "low_rank")
    for repeated in (rows[:4].repeat(9, 1), rows[:4].repeat(9, 1).float()):
        assert CompactGaussian.of(repeated, "low_rank").factors.shape[1] == 2
        with pytest.raises(ValueError, match="those that repeat are one"):
            CompactGaussian.of(repeated, "full").log_density(repeated)
    fixed = CompactGaussian.of(rows.where(torch.arange(D) != 2, 1.0))
    whole = CompactGaussian.of(rows.where(torch.arange(D) != 2, 1.0), "full")
    for singular in (fixed, whole):
        with pytest.raises(ValueError, match="weight 2 is the same in all"):
            singular.log_density(rows)
    with pytest.raises(ValueError, match="found 6"):
        CompactGaussian.of(rows).log_density(rows[:, :6])
