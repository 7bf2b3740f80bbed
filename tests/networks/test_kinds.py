"""Every usual kind of network gets a posterior, or hears which layer is in the way."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sgdgp.networks import Categorical, WeightCG, linearise
from tests.networks.kinds import CLASSES, KINDS, inputs_of, network_of

CASES = [*((kind, torch.float64) for kind in KINDS), ("resnet", torch.float32)]


@pytest.mark.parametrize(("kind", "dtype"), CASES)
def test_every_kind_of_network_gets_the_exact_posterior(kind, dtype):
    network, _ = network_of(kind, dtype)
    x = inputs_of(kind, 40, dtype)
    y = x.flatten(1)[:, :CLASSES].argmax(1)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    posterior = linearise(network, Categorical()).fit(
        TensorDataset(x[:30], y[:30]),
        steps=0,
        precision=0.5,
        num_samples=2,
        final_samples=200,
        solver=WeightCG(tolerance=1e-3),
    )
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name])

    root = posterior.prior.root(torch.eye(posterior.tangent.num_weights, dtype=dtype))
    jacobian = (posterior.tangent.at(x).jacobian() @ root).double()
    outputs = posterior.linear_mean(x[:30]).double()
    likelihood = Categorical()
    features = likelihood.hessian_root_transpose(outputs, jacobian[:30]).flatten(0, 1)
    precision = features.T @ features
    precision.diagonal().add_(1.0)
    test = jacobian[30:]
    exact = (test @ torch.linalg.inv(precision) * test).sum(2)
    _, fluctuations = posterior.fluctuations(x[30:])
    ratio = fluctuations.double().square().mean(2) / exact
    # Each ratio is chi-squared with 200 degrees of freedom over 200.
    assert float((ratio - 1).abs().max()) < 5 * (2 / 200) ** 0.5
    assert float(posterior.predict(x[30:]).sum(1).sub(1).abs().max()) < 1e-5


class Opaque(torch.autograd.Function):
    """Differentiable once, by a rule of its own, and not forwards."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient.clone()


class OpaqueLayer(nn.Module):
    def forward(self, x):
        return Opaque.apply(x)


def test_a_layer_that_cannot_be_differentiated_is_named():
    network = nn.Sequential()
    network.add_module("first", nn.Linear(4, 5))
    network.add_module("opaque", OpaqueLayer())
    network.add_module("head", nn.Linear(5, 3))
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(NotImplementedError, match="opaque"):
        linearise(network.eval(), Categorical()).fit(
            TensorDataset(x, x[:, :3].argmax(1)), steps=1, final_samples=2
        )
