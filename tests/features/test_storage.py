"""Feature maps and prior draws come back from their state bit by bit."""

from __future__ import annotations

import json

import pytest
import torch
from gpytorch.kernels import IndexKernel, PiecewisePolynomialKernel, RBFKernel

from sgdgp.core.errors import NotStorableError
from sgdgp.features import (
    ExactDraws,
    FeatureMap,
    draw_prior,
    has_features,
    random_features,
)
from sgdgp.features.storage import (
    _STORED,
    draws_from,
    features_from,
    register_stored_features,
    state_of_draws,
    state_of_features,
)
from tests.models import FEATURE_KERNELS, toy_data


class Halved(FeatureMap):
    """A user's map: that of another with half the amplitude."""

    exact = False

    def __init__(self, base, factor):
        self.base, self.factor = base, factor
        self.num_features = base.num_features

    def features(self, x):
        return self.base.features(x) * self.factor

    def forward(self, x, w):
        return self.base.forward(x, w) * self.factor

    def adjoint(self, x, v):
        return self.base.adjoint(x, v) * self.factor


def through_json(state):
    return json.loads(json.dumps(state))


def map_of(name, generator, num_features=32):
    kernel = FEATURE_KERNELS[name]().double()
    return random_features(
        kernel,
        dim=2,
        num_features=num_features,
        generator=generator,
        dtype=torch.float64,
    )


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_the_map_of_every_kernel_comes_back(name, generator):
    features, x = map_of(name, generator), toy_data(5)[0]
    tensors = {}
    state = through_json(state_of_features(features, "map", tensors))
    again = features_from(state, tensors)
    assert type(again) is type(features)
    assert again.exact == features.exact
    assert again.num_features == features.num_features
    assert torch.equal(again.features(x), features.features(x))


@pytest.mark.parametrize("name", FEATURE_KERNELS)
def test_draws_of_every_kernel_come_back(name, generator):
    kernel = FEATURE_KERNELS[name]().double()
    draws = draw_prior(
        kernel,
        7,
        dim=2,
        num_features=32,
        generator=generator,
        dtype=torch.float64,
        group_size=3,
    )
    x = toy_data(5)[0]
    tensors = {}
    state = through_json(state_of_draws(draws, "draws", tensors))
    again = draws_from(state, tensors, kernel, x)
    assert again.num_samples == 7
    assert torch.equal(again(x), draws(x))
    assert all(key.startswith("draws.") for key in tensors)


def test_no_draws_at_all_come_back(generator):
    draws = draw_prior(RBFKernel(), 0, dim=2, generator=generator)
    x = toy_data(5, dtype=torch.float32)[0]
    again = draws_from(state_of_draws(draws, "none", {}), {}, RBFKernel(), x)
    assert again(x).shape == (5, 0)


def test_exact_draws_keep_their_values_and_go_on_as_they_would_have(generator):
    kernel = PiecewisePolynomialKernel(q=2).double()
    assert not has_features(kernel)
    x, later = toy_data(20, 1)[0], toy_data(6, 1, seed=4)[0]
    draws = ExactDraws(kernel, 3, x, generator=generator, max_points=50)
    tensors = {}
    state = through_json(state_of_draws(draws, "exact", tensors))
    tensors = {key: value.clone() for key, value in tensors.items()}
    again = draws_from(state, tensors, kernel, x)
    assert torch.equal(again(x), draws(x))
    assert again.max_points == 50
    assert torch.equal(again(later), draws(later))


def test_index_features_come_back(generator):
    kernel = IndexKernel(num_tasks=3, rank=2).double()
    features = random_features(
        kernel, dim=1, num_features=8, generator=generator, dtype=torch.float64
    )
    tensors = {}
    state = through_json(state_of_features(features, "map", tensors))
    x = torch.tensor([[0.0], [2.0], [1.0]], dtype=torch.float64)
    again = features_from(state, tensors)
    assert torch.equal(again.features(x), features.features(x))


def test_a_users_map_is_refused_until_it_is_registered(generator, monkeypatch):
    monkeypatch.setattr("sgdgp.features.storage._STORED", dict(_STORED))
    features = Halved(map_of("product", generator), 0.5)
    with pytest.raises(NotStorableError, match="Halved cannot be stored: register"):
        state_of_features(features, "map", {})
    register_stored_features(Halved)
    assert register_stored_features(Halved) is Halved
    tensors = {}
    state = through_json(state_of_features(features, "map", tensors))
    x = toy_data(5)[0]
    again = features_from(state, tensors)
    assert torch.equal(again.features(x), features.features(x))
    impostor = type("Halved", (Halved,), {})
    with pytest.raises(ValueError, match="another class named Halved"):
        register_stored_features(impostor)
    with pytest.raises(NotStorableError, match="Halved"):
        state_of_features(impostor(features, 0.5), "map", {})


def test_an_argument_that_cannot_be_stored_is_named(generator, monkeypatch):
    monkeypatch.setattr("sgdgp.features.storage._STORED", dict(_STORED))
    register_stored_features(Halved)
    features = Halved(map_of("rbf", generator), torch.sin)
    with pytest.raises(NotStorableError, match=r"map\.factor is a builtin"):
        state_of_features(features, "map", {})


def test_unknown_maps_and_draws_are_refused():
    with pytest.raises(ValueError, match=r"'os\.system', which are not registered"):
        features_from({"map": "os.system", "arguments": {}}, {})
    with pytest.raises(ValueError, match="unknown prior draws 'magic'"):
        draws_from({"draws": "magic", "name": "a"}, {}, RBFKernel(), torch.zeros(1, 1))
