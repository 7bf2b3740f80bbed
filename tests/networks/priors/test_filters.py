"""Smooth filters: correlated within a kernel, independent of each other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgdgp.networks import Filters, Gaussian, linearise
from sgdgp.networks.priors.base import no_probes
from sgdgp.tangent import Tangent


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 2, 1), nn.Flatten()
    return nn.Sequential(*layers).double().eval()


def test_weights_of_a_kernel_correlate_by_their_distance(network):
    prior = Filters(length=0.7).build(Tangent(network), no_probes)
    found = prior.covariance(torch.eye(prior.num_weights, dtype=torch.float64))
    expected = torch.eye(prior.num_weights, dtype=torch.float64)
    for i in range(9):
        for j in range(9):
            far = ((i // 3 - j // 3) ** 2 + (i % 3 - j % 3) ** 2) ** 0.5
            for pair in range(6):
                at = 9 * pair
                expected[at + i, at + j] = torch.tensor(-far / 0.7).exp()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert prior.num_groups == 4


def test_the_evidence_chooses_the_length_that_weights_were_drawn_with(network):
    """Of data that the linear model itself made, of 300 filters' worth of images."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 2, 5, 5, generator=generator, dtype=torch.float64)
    tangent = Tangent(network, weights="0.weight")
    true = Filters(length=4.0, groups="all").build(tangent, no_probes)
    y = tangent.at(x).jvp(true.sample(1, generator))[..., 0]
    y = y + 0.05 * torch.randn(y.shape, generator=generator)
    for order in ((0.2, 4.0), (4.0, 0.2)):
        posterior = linearise(
            network,
            Gaussian(noise=0.0025),
            Filters(length=order, groups="all"),
            weights="0.weight",
            mean="linear",
        ).fit([(x, y)], final_samples=2)
        assert posterior.settings == Filters(length=4.0, groups="all")


def test_lengths_that_are_none_are_refused(network):
    with pytest.raises(ValueError, match="length: expected a positive"):
        Filters(length=-1.0)
    with pytest.raises(ValueError, match="length: expected at least one"):
        Filters(length=())
    with pytest.raises(ValueError, match="length: expected one that leaves"):
        Filters(length=1e17).build(Tangent(network), no_probes)
    with pytest.raises(ValueError, match="length: expected one, found"):
        Filters().build(Tangent(network), no_probes)


def test_weights_of_other_layers_are_independent():
    torch.manual_seed(0)
    network = nn.Bilinear(2, 3, 2).double()
    module = nn.Sequential(nn.Flatten(), _Squared(network)).eval()
    prior = Filters(length=1.0).build(Tangent(module), no_probes)
    eye = torch.eye(prior.num_weights, dtype=torch.float64)
    torch.testing.assert_close(prior.covariance(eye), eye)


class _Squared(nn.Module):
    """A bilinear layer of its input, and of a part of it."""

    def __init__(self, layer: nn.Bilinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):
        """(b, 3) -> (b, 2)."""
        return self.layer(x[:, :2], x)
