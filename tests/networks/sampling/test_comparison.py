"""Figures of two posteriors side by side, against their definitions."""

from __future__ import annotations

import functools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from sgdgp.networks import (
    Bernoulli,
    Categorical,
    Gaussian,
    Isotropic,
    LinearisedPosterior,
    Potential,
    linearise,
)
from sgdgp.networks.sampling import CompactGaussian, Draws, compare

D, N = 26, 40


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


@functools.cache
def classes() -> Potential:
    return Potential.from_network(network(), Categorical(), [data()])


def draws(model: Potential, seed: int = 0, chains: int = 2, spread: float = 0.3):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(chains, 30, D, generator=generator, dtype=torch.float64)
    tangent = model.tangent
    return Draws(
        model.theta + spread * noise, tangent.names, [*map(tuple, tangent.shapes)]
    )


def gaussian(seed: int) -> CompactGaussian:
    return CompactGaussian.of(draws(classes(), seed))


def test_weights_compare_as_gaussians_of_independent_weights():
    p, q = gaussian(0), gaussian(1)
    found = compare(p, q).weights
    sides = [Independent(Normal(g.mean, g.standard_deviation), 1) for g in (p, q)]
    assert found.divergence == pytest.approx(float(kl_divergence(*sides)))
    pair = torch.stack([p.mean, q.mean])
    assert found.mean_correlation == pytest.approx(float(pair.corrcoef()[0, 1]))
    ratio = p.standard_deviation / q.standard_deviation
    assert found.deviation_ratio == pytest.approx(float(ratio.median()))
    full = CompactGaussian.of(draws(classes()), "low_rank", rank=3)
    assert compare(full, q).weights.divergence == pytest.approx(found.divergence)


def test_a_posterior_equals_itself():
    x, y = data()
    own = draws(classes())
    found = compare(own, own, model=classes(), x=x, y=y)
    assert found.weights.mean_correlation == pytest.approx(1.0)
    assert found.weights.deviation_ratio == 1.0
    assert found.weights.divergence == pytest.approx(0.0, abs=1e-9)
    assert found.function is not None
    assert found.function.agreement == 1.0
    assert found.function.total_variation == 0.0
    assert found.function.deviation_ratio == 1.0


def test_functions_compare_by_their_mean_probabilities():
    x, y = data()
    first, second = draws(classes(), 0), draws(classes(), 1, spread=1.5)
    found = compare(first, second, model=classes(), x=x, y=y).function
    p, q = (each.predict(classes(), x) for each in (first, second))
    assert isinstance(p, Tensor)
    assert isinstance(q, Tensor)
    assert found is not None
    assert found.agreement == pytest.approx(
        float((p.argmax(1) == q.argmax(1)).double().mean())
    )
    distance = 0.5 * (p - q).abs().sum(1).mean()
    assert found.total_variation == pytest.approx(float(distance))
    assert found.scores is not None
    nll = -p[torch.arange(N), y].log().mean()
    assert found.scores["nll"][0] == pytest.approx(float(nll))
    accuracy = (q.argmax(1) == y).double().mean()
    assert found.scores["accuracy"][1] == pytest.approx(float(accuracy))
    deviations = [
        each.function(classes(), x).flatten(0, 1).std(0) for each in (first, second)
    ]
    ratio = (deviations[0] / deviations[1]).median()
    assert found.deviation_ratio == pytest.approx(float(ratio))


def test_labels_compare_by_whether_they_are_likelier_than_not():
    x, y = data()
    torch.manual_seed(0)
    labels = nn.Sequential(nn.Linear(3, 1)).double().eval()
    model = Potential.from_network(labels, Bernoulli(), [(x, y.double())])
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 10, 4, generator=generator, dtype=torch.float64)
    first, second = (
        Draws(weights, model.tangent.names, [(1, 3), (1,)])
        for weights in (rows, rows + 0.5)
    )
    found = compare(first, second, model=model, x=x, y=y).function
    p, q = (each.predict(model, x) for each in (first, second))
    assert isinstance(p, Tensor)
    assert isinstance(q, Tensor)
    assert found is not None
    alike = ((p > 0.5) == (q > 0.5)).double().mean()
    assert found.agreement == pytest.approx(float(alike))
    assert found.total_variation == pytest.approx(float((p - q).abs().mean()))
    assert found.scores is not None
    right = ((p[:, 0] > 0.5) == y.bool()).double().mean()
    assert found.scores["accuracy"][0] == pytest.approx(float(right))


def test_a_permuted_copy_has_the_same_function_and_other_weights():
    x, _ = data()
    own = draws(classes())
    tensors = classes().tangent.weights_of(own.flat)
    order = torch.tensor([2, 0, 3, 1])
    moved = torch.cat(
        [
            tensors["0.weight"][:, order].flatten(1),
            tensors["0.bias"][:, order],
            tensors["2.weight"][:, :, order].flatten(1),
            tensors["2.bias"],
        ],
        1,
    )
    other = replace(own, weights=moved.view(2, 30, D))
    found = compare(own, other, model=classes(), x=x)
    assert found.function is not None
    assert found.function.total_variation == pytest.approx(0.0, abs=1e-12)
    assert found.weights.divergence > 10.0
    assert "The means hardly correlate" in str(found)


def test_conditional_deviations_and_caveats_are_said():
    p, q = gaussian(0), gaussian(1)
    mean_field = replace(q, deviations="conditional", warnings=("It is odd.",))
    found = compare(p, mean_field)
    assert "The first's deviations are marginal, the second's conditional" in str(found)
    assert "The second: It is odd." in str(found)
    # Chains in two copies of the network.
    apart = draws(classes())
    apart.weights[1] += 5.0
    assert "The first: R-hat of the weights is" in str(compare(apart, q))
    assert str(compare(apart, apart)).count("R-hat of the weights is") == 1


@functools.cache
def regression() -> LinearisedPosterior:
    x, _ = data()
    model = network()
    y = model(x).detach() + 0.1 * torch.randn(
        N, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    settings = {"steps": 0, "precision": 200.0, "final_samples": 100, "progress": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return linearise(model, Gaussian(0.01), Isotropic(), mean="network").fit(
            [(x, y)], **settings
        )


def test_a_linearised_posterior_compares_with_its_own_gaussian():
    x, _ = data()
    posterior = regression()
    own = CompactGaussian.of_posterior(posterior, "full")
    y = posterior.network_outputs(x)
    found = compare(posterior, own, model=posterior, x=x, y=y)
    assert found.weights.mean_correlation == pytest.approx(1.0)
    assert found.function is not None
    # Where deviations are small the network is linear in its weights.
    assert found.function.deviation_ratio == pytest.approx(1.0, abs=0.15)
    assert found.function.mean_difference is not None
    assert found.function.mean_difference < 0.5
    assert found.function.scores is not None
    rmse, of_mean = found.function.scores["rmse"][0], posterior.predict(x).mean - y
    assert rmse == pytest.approx(float(of_mean.square().mean().sqrt()), abs=0.01)


def test_a_generator_gives_both_sides_the_same_networks():
    p = gaussian(0)
    generator = torch.Generator().manual_seed(3)
    found = compare(p, p, model=classes(), x=data()[0], samples=5, seed=generator)
    assert found.function is not None
    assert found.function.total_variation == 0.0


def test_bad_input_is_refused():
    p = gaussian(0)
    with pytest.raises(TypeError, match="second: expected Draws"):
        compare(p, p.mean)
    with pytest.raises(ValueError, match="x: expected it and model"):
        compare(p, p, x=data()[0])
    with pytest.raises(ValueError, match="other: expected 26 weights, found 3"):
        compare(p, CompactGaussian.of(torch.randn(5, 3, dtype=torch.float64)))
    with pytest.raises(
        ValueError, match=r"second: expected weights .'a'. as the first"
    ):
        compare(replace(p, names=("a",)), replace(p, names=("b",)))


def test_positions_without_a_label_have_no_score():
    x = torch.randn(4, 3, 3, dtype=torch.float64)
    model = nn.Linear(3, 2).double().eval()
    y = model(x).argmax(2)
    y[:, 1] = -100
    likelihood = Categorical(ignore_index=-100)
    potential = Potential.from_network(model, likelihood, [(x, y)])
    rows = potential.theta + 1e-6 * torch.randn(5, 8, dtype=torch.float64)
    found = compare(
        CompactGaussian.of(rows), CompactGaussian.of(rows), model=potential, x=x, y=y
    )
    assert found.function.scores["accuracy"] == (1, 1)
