"""A network's tangent kernel is a GPyTorch kernel, and an exact feature map."""

from __future__ import annotations

import copy

import gpytorch
import pytest
import torch
from gpytorch.kernels import ScaleKernel
from torch import nn

from sgdgp.features import random_features
from sgdgp.kernels import NeuralTangentKernel
from tests.networks.kinds import CLASSES, inputs_of, network_of


def dense(network, x1, x2):
    """Sum over all weights of the products of central differences of outputs."""
    step = 1e-5
    total = 0
    copied = copy.deepcopy(network)
    for parameter in copied.parameters():
        flat = parameter.data.view(-1)
        for i in range(len(flat)):
            values = []
            for sign in (1, -1):
                flat[i] += sign * step
                with torch.no_grad():
                    values.append([copied(x).flatten() for x in (x1, x2)])
                flat[i] -= sign * step
            slopes = [(a - b) / (2 * step) for a, b in zip(*values, strict=True)]
            total = total + torch.outer(*slopes)
    return total


@pytest.fixture
def scalar():
    """A regression network of one output in two dimensions."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))
    return network.double().eval()


def points(n, dim=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["mlp", "lstm"])
def test_values_are_products_of_output_slopes(kind):
    network, shape = network_of(kind)
    kernel = NeuralTangentKernel(network, input_shape=shape)
    x1, x2 = inputs_of(kind, 3), inputs_of(kind, 2, seed=5)
    expected = dense(network, x1, x2)
    found = kernel(x1.flatten(1), x2.flatten(1))
    assert found.shape == (3 * CLASSES, 2 * CLASSES)
    assert torch.allclose(found.to_dense(), expected, atol=1e-7)
    square = kernel(x1.flatten(1)).to_dense()
    assert torch.allclose(kernel(x1.flatten(1), diag=True), square.diagonal())


def test_features_are_the_kernel(scalar):
    kernel = ScaleKernel(NeuralTangentKernel(scalar))
    kernel.outputscale = 2.5
    x = points(6)
    features = random_features(
        kernel,
        dim=2,
        num_features=4,
        generator=torch.Generator(),
        dtype=torch.float64,
    )
    phi = features.features(x)
    assert features.exact
    assert torch.allclose(phi @ phi.mT, kernel(x).to_dense())


def test_batches_of_inputs_give_batches_of_kernels(scalar):
    kernel = NeuralTangentKernel(scalar)
    x = points(6).reshape(2, 3, 2)
    found = kernel(x).to_dense()
    assert found.shape == (2, 3, 3)
    assert torch.allclose(found[1], kernel(x[1]).to_dense())
    assert torch.allclose(kernel(x, diag=True), found.diagonal(dim1=-2, dim2=-1))


class Regression(gpytorch.models.ExactGP):
    """A zero-mean GP with a scaled tangent kernel."""

    def __init__(self, x, y, likelihood, network):
        super().__init__(x, y, likelihood)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = ScaleKernel(NeuralTangentKernel(network))

    def forward(self, x):
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


def test_gpytorch_learns_its_scale_and_leaves_the_network_alone(scalar):
    x = points(20)
    y = torch.sin(2 * x[:, 0])
    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    model = Regression(x, y, likelihood, scalar).double()
    before = copy.deepcopy(scalar.state_dict())
    model.train()
    likelihood.train()
    assert {name.split(".")[-1] for name, _ in model.named_parameters()} == {
        "raw_noise",
        "raw_constant",
        "raw_outputscale",
    }
    objective = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = -objective(model(x), y)
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(v, before[n]) for n, v in scalar.state_dict().items())
    model.eval()
    assert not scalar.training
    new = points(4, seed=1)
    with torch.no_grad():
        found = model(new).mean
        scale = model.covar_module.outputscale
        gram = scale * dense(scalar, x, x)
        gram += likelihood.noise * torch.eye(20, dtype=torch.float64)
        constant = model.mean_module.constant
        solved = torch.linalg.solve(gram, y - constant)
        expected = constant + scale * dense(scalar, new, x) @ solved
    assert torch.allclose(found, expected, atol=1e-5)


def test_single_precision_agrees_with_double(scalar):
    x = points(5)
    exact = NeuralTangentKernel(scalar)(x).to_dense()
    single = NeuralTangentKernel(copy.deepcopy(scalar).float())(x.float()).to_dense()
    assert single.dtype == torch.float32
    assert torch.allclose(single.double(), exact, rtol=1e-4, atol=1e-4)


def test_a_copied_model_shares_the_network(scalar):
    kernel = NeuralTangentKernel(scalar)
    copied = copy.deepcopy(kernel)
    assert copied.feature_map.tangent.network is scalar
    x = points(3)
    assert torch.equal(copied(x).to_dense(), kernel(x).to_dense())


def test_columns_can_be_chosen(scalar):
    kernel = NeuralTangentKernel(scalar, active_dims=(1, 3))
    x = points(4, dim=5)
    expected = NeuralTangentKernel(scalar)(x[:, [1, 3]]).to_dense()
    assert torch.allclose(kernel(x).to_dense(), expected)


def test_unusable_arguments_are_refused(scalar):
    with pytest.raises(ValueError, match=r"batch_shape.*found \(2,\)"):
        NeuralTangentKernel(scalar, batch_shape=torch.Size([2]))
    with pytest.raises(TypeError, match="no argument 'lengthscale'"):
        NeuralTangentKernel(scalar, lengthscale=1.0)
    with pytest.raises(ValueError, match=r"float64 on cpu.*found torch.float32"):
        NeuralTangentKernel(scalar)(points(3).float()).to_dense()
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        NeuralTangentKernel(torch.tanh)


def test_words_are_inputs_as_integers_and_as_whole_numbers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(8, 1)).eval()
    x = torch.tensor([[1, 2], [0, 8], [3, 3]])
    kernel = NeuralTangentKernel(network)
    jacobian = torch.zeros(3, 45)
    embed, weight = network[0].weight.detach(), network[2].weight.detach()[0]
    for row, words in zip(jacobian, x.tolist(), strict=True):
        for place, word in enumerate(words):
            row[4 * word : 4 * word + 4] += weight[4 * place : 4 * place + 4]
        row[36:44], row[44] = embed[words].flatten(), 1.0
    for inputs in (x, x.float(), x.double()):
        found = kernel(inputs).to_dense()
        assert torch.allclose(found.float(), jacobian @ jacobian.mT, atol=1e-5)
    with pytest.raises(ValueError, match="whole numbers"):
        kernel(x + 0.5).to_dense()
