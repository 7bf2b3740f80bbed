"""Feature maps and prior draws come back from their state bit by bit."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import (
    IndexKernel,
    PiecewisePolynomialKernel,
    RBFKernel,
    ScaleKernel,
)

from sgdgp.core import codec
from sgdgp.core.errors import NotStorableError
from sgdgp.features import (
    ExactDraws,
    FeatureMap,
    draw_prior,
    has_features,
    random_features,
)
from sgdgp.features.storage import register_stored_features
from sgdgp.kernels import NeuralTangentKernel
from tests.models import FEATURE_KERNELS, toy_data
from tests.stored import stored


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
    again = stored(features)
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
    again = stored(draws, kernel, x)
    assert again.num_samples == 7
    assert torch.equal(again(x), draws(x))


def test_no_draws_at_all_come_back(generator):
    draws = draw_prior(RBFKernel(), 0, dim=2, generator=generator)
    x = toy_data(5, dtype=torch.float32)[0]
    again = stored(draws, RBFKernel(), x)
    assert again(x).shape == (5, 0)


def test_exact_draws_keep_their_values_and_go_on_as_they_would_have(generator):
    kernel = PiecewisePolynomialKernel(q=2).double()
    assert not has_features(kernel)
    x, later = toy_data(20, 1)[0], toy_data(6, 1, seed=4)[0]
    draws = ExactDraws(kernel, 3, x, generator=generator, max_points=50)
    again = stored(draws, kernel, x)
    assert torch.equal(again(x), draws(x))
    assert again.max_points == 50
    assert torch.equal(again(later), draws(later))


def test_exact_draws_of_a_file_that_a_gpu_has_written_go_on(generator):
    kernel = PiecewisePolynomialKernel(q=2).double()
    x, later = toy_data(20, 1)[0], toy_data(6, 1, seed=4)[0]
    draws = ExactDraws(kernel, 3, x, generator=generator, max_points=50)
    parts = draws.stored_parts()
    # On a GPU a generator's state is a seed and how far it has come.
    state = torch.arange(16, dtype=torch.uint8)
    one, other = (
        ExactDraws.from_stored_parts(**{**parts, "generator": state}) for _ in range(2)
    )
    assert torch.equal(one(x), draws(x))
    assert torch.equal(one(later), other(later))
    assert bool(one(later).isfinite().all())


def test_index_features_come_back(generator):
    kernel = IndexKernel(num_tasks=3, rank=2).double()
    features = random_features(
        kernel, dim=1, num_features=8, generator=generator, dtype=torch.float64
    )
    x = torch.tensor([[0.0], [2.0], [1.0]], dtype=torch.float64)
    again = stored(features)
    assert torch.equal(again.features(x), features.features(x))


def test_a_users_map_is_refused_until_it_is_registered(generator, monkeypatch):
    monkeypatch.setattr("sgdgp.core.codec._STORED", dict(codec._STORED))
    features = Halved(map_of("product", generator), 0.5)
    with pytest.raises(NotStorableError, match="Halved, which cannot be stored: reg"):
        stored(features)
    register_stored_features(Halved)
    assert register_stored_features(Halved) is Halved
    x = toy_data(5)[0]
    again = stored(features)
    assert torch.equal(again.features(x), features.features(x))


def test_an_argument_that_cannot_be_stored_is_named(generator, monkeypatch):
    monkeypatch.setattr("sgdgp.core.codec._STORED", dict(codec._STORED))
    register_stored_features(Halved)
    features = Halved(map_of("rbf", generator), torch.sin)
    with pytest.raises(NotStorableError, match=r"map\.factor is a builtin"):
        stored(features, name="map")


def test_a_part_that_the_kernel_gives_is_made_anew(generator):
    kernel = ScaleKernel(NeuralTangentKernel(network_of_two().double()))
    x = toy_data(5)[0]
    draws = draw_prior(kernel, 3, dim=2, generator=generator, dtype=torch.float64)
    assert torch.equal(stored(draws, kernel, x)(x), draws(x))
    with pytest.raises(ValueError, match="the kernel has others"):
        stored(draws, ScaleKernel(RBFKernel()).double(), x)


def network_of_two():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torch.nn.Sequential(
            torch.nn.Linear(2, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1)
        )
