"""Passes over the data against dense features."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.networks import Categorical, curvature
from sgdgp.networks.curvature import (
    LinearJacobian,
    TangentData,
    curvature_probes,
    example_noise,
)
from sgdgp.networks.stream import stream_of
from sgdgp.tangent import Tangent
from tests.networks.dense import CLASSES, EXAMPLES, columns, tiny_system


@pytest.mark.parametrize("batch", [1, 7, 23])
def test_products_are_those_of_the_dense_features(batch):
    system, features, _, _ = tiny_system(batch)
    v = columns(system.num_weights, 3)
    torch.testing.assert_close(system.product(v), features.T @ (features @ v))


def test_batches_of_examples_add_up_to_the_whole():
    system, features, _, _ = tiny_system(batch=5)
    v = columns(system.num_weights, 2)
    total = sum(system.batch_product(batch, v) for batch in system.data.stream)
    torch.testing.assert_close(total, features.T @ (features @ v))


def test_forward_and_adjoint_are_transposes():
    system, _, _, _ = tiny_system()
    w = columns(system.num_weights, 2)
    u = columns(EXAMPLES * CLASSES, 2).unflatten(0, (EXAMPLES, CLASSES))
    forward = system.data.forward(w)
    adjoint = system.data.adjoint(lambda batch, at: u[batch.rows], 2)
    torch.testing.assert_close((forward * u).sum((0, 1)), (adjoint * w).sum(0))


def test_the_slope_is_the_gradient_of_the_loss():
    system, _, jacobian, y = tiny_system()
    v = columns(system.num_weights, 1).requires_grad_()
    outputs = (jacobian @ v)[..., 0]
    loss = torch.nn.functional.cross_entropy(outputs, y, reduction="sum")
    (gradient,) = torch.autograd.grad(loss, v)
    here = system.at(outputs.detach())
    torch.testing.assert_close(here.slope(), gradient)
    tables = torch.stack([outputs, 2 * outputs], 2).detach()
    doubled = torch.nn.functional.cross_entropy(2 * outputs, y, reduction="sum")
    torch.testing.assert_close(
        system.loss(tables), torch.stack([loss, doubled]).detach()
    )


def test_noise_depends_on_examples_and_samples_only():
    coarse, fine = tiny_system(batch=23)[0], tiny_system(batch=3)[0]
    expected = coarse.noise(range(20), seed=4)
    torch.testing.assert_close(fine.noise(range(20), seed=4), expected)
    torch.testing.assert_close(fine.noise(range(5, 11), seed=4), expected[:, 5:11])
    assert not torch.allclose(fine.noise(range(20), seed=3), expected)


def test_noise_has_the_covariance_of_the_curvature():
    system, features, _, _ = tiny_system()
    count = 4000
    noise = system.noise(range(count), seed=0)
    exact = features.T @ features
    found = noise @ noise.T / count
    # Entrywise standard error of a sample covariance.
    error = ((exact.square() + exact.diagonal().outer(exact.diagonal())) / count).sqrt()
    assert float(((found - exact) / error).abs().max()) < 5


def test_squares_of_probes_estimate_the_diagonal_of_the_curvature():
    system, _, jacobian, _ = tiny_system()
    count = 3000
    squares = sum(
        probe.square().mean(1)
        for probe in curvature_probes(
            system.data, system.likelihood, system.outputs, count, seed=1
        )
    )
    root = system.prior.root(torch.ones(system.num_weights, 1).double())
    plain = system.likelihood.hessian_root_transpose(
        system.outputs, jacobian / root[:, 0]
    )
    exact = plain.flatten(0, 1).square().sum(0)
    # Four batches: a relative standard error of at most sqrt(2 / 3000) each.
    assert float((squares / exact - 1).abs().max()) < 5 * (2 / count) ** 0.5


def test_noise_of_an_example_depends_on_its_number_and_the_sample_only():
    numbers = torch.tensor([3, 40, 41, 100])
    all_at_once = example_noise(numbers, 5, range(20), seed=7)
    assert all_at_once.shape == (4, 5, 20)
    one = example_noise(numbers[2:3], 5, range(9, 11), seed=7)
    assert torch.equal(one[0], all_at_once[2, :, 9:11])
    turned = example_noise(numbers.flip(0), 5, range(20), seed=7)
    assert torch.equal(turned.flip(0), all_at_once)
    other = example_noise(numbers, 5, range(20), seed=8)
    assert not (other == all_at_once).any()


def test_noise_is_standard_normal_and_independent():
    n, k = 400, 16
    noise = example_noise(torch.arange(n), 3, range(k), seed=0).double()
    assert abs(float(noise.mean())) < 4 / noise.numel() ** 0.5
    assert abs(float(noise.var()) - 1) < 4 * (2 / noise.numel()) ** 0.5
    for matrix in (noise.flatten(0, 1).mT, noise.flatten(1).mT):
        columns = matrix.shape[1]
        correlation = matrix @ matrix.mT / columns
        off = correlation - correlation.diagonal().diag()
        assert float(off.abs().max()) < 4.5 / columns**0.5


def test_targets_that_do_not_match_the_inputs_are_refused():
    system, _, _, _ = tiny_system()
    stream = system.data.stream
    x, y = next(iter(stream)).x, next(iter(stream)).y
    data = TangentData(
        system.data.tangent, stream_of([(x, y[:-2])], system.outputs.device)
    )
    with pytest.raises(ValueError, match=r"5 targets.* 7 outputs"):
        _ = data.network_outputs


class Scaled(nn.Sequential):
    """Says more than its last layer does."""

    def forward(self, x):
        return 2 * super().forward(x)


class Twice(nn.Module):
    """Uses its layer twice."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.layer(x))


def last_layer_of(network, x, y, likelihood=None):
    tangent = Tangent(network.double().eval(), weights="last_layer")
    loader = DataLoader(TensorDataset(x, y), batch_size=3)
    return TangentData(tangent, stream_of(loader, tangent.device), likelihood)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8, 4), (8, 5, 4)], ids=["rows", "positions"])
def test_a_last_layer_is_known_by_its_inputs(monkeypatch, bias, shape):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3, bias=bias))
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randint(3, shape[:-1])
    y[2] = -100
    likelihood = Categorical(ignore_index=-100)
    data = last_layer_of(network, x, y, likelihood)
    assert isinstance(data._kept, LinearJacobian)
    monkeypatch.setattr(curvature, "_KEPT_NUMBERS", 0)
    other = last_layer_of(network, x, y, likelihood)
    assert other._kept is None
    w = columns(data.tangent.num_weights, 3)
    torch.testing.assert_close(data.forward(w), other.forward(w))
    u = torch.randn(*data.network_outputs.shape, 2, dtype=torch.float64)
    one, two = (d.adjoint(lambda b, at: u[b.rows], 2) for d in (data, other))
    torch.testing.assert_close(one, two)
    for batch in data.stream:
        torch.testing.assert_close(
            data.at(batch).jacobian(), other.at(batch).jacobian()
        )


@pytest.mark.parametrize(
    "network",
    [Scaled(nn.Linear(4, 4)), Twice(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())],
)
def test_what_is_more_than_a_last_layer_is_noticed(network):
    data = last_layer_of(network, torch.randn(8, 4).double(), torch.arange(8) % 4)
    assert not isinstance(data._kept, LinearJacobian)
