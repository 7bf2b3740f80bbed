"""The features of a tangent kernel are the Jacobian times the prior's root."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sgdgp.tangent import IdentityRoot, Tangent, TangentFeatures, WeightRoot
from tests.networks.kinds import CLASSES, inputs_of, network_of


class Dense:
    """A prior root that is any matrix."""

    def __init__(self, matrix):
        self.matrix = matrix
        self.num_weights = len(matrix)

    def root(self, z):
        return self.matrix @ z

    def root_adjoint(self, w):
        return self.matrix.mT @ w


def normal(*shape, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.fixture(params=["mlp", "resnet"])
def problem(request):
    """Features with a dense root, flat inputs, and phi itself."""
    network, shape = network_of(request.param)
    tangent = Tangent(network)
    root = Dense(normal(tangent.num_weights, tangent.num_weights))
    x = inputs_of(request.param, 11)
    phi = tangent.at(x).jacobian().flatten(0, 1) @ root.matrix
    return TangentFeatures(tangent, root, shape), x.flatten(1), phi


def test_products_equal_those_of_the_feature_matrix(problem):
    features, x, phi = problem
    assert isinstance(features.root, WeightRoot)
    w, v = normal(features.num_features, 3), normal(11 * CLASSES, 2)
    assert torch.allclose(features.features(x), phi)
    assert torch.allclose(features.forward(x, w), phi @ w)
    assert torch.allclose(features.adjoint(x, v), phi.mT @ v)
    assert features.exact
    assert features.num_outputs(x) == CLASSES


def test_parts_of_rows_do_not_matter(problem, monkeypatch):
    features, x, phi = problem
    w, v = normal(features.num_features, 3), normal(11 * CLASSES, 2)
    monkeypatch.setattr(Tangent, "examples_at_once", lambda self: 4)
    assert torch.allclose(features.forward(x, w), phi @ w)
    assert torch.allclose(features.adjoint(x, v), phi.mT @ v)


def test_no_rows_are_fine(problem):
    features, x, _ = problem
    assert features.features(x[:0]).shape == (0, features.num_features)
    assert features.forward(x[:0], normal(features.num_features, 2)).shape == (0, 2)
    assert not features.adjoint(x[:0], normal(0, 2)).any()


def test_values_are_differentiable_in_the_inputs():
    network, _ = network_of("mlp")
    features = TangentFeatures(Tangent(network))
    w = normal(features.num_features, 2)
    x = normal(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: features.forward(x, w), x)
    v = normal(3 * CLASSES, 1)
    assert torch.autograd.gradcheck(lambda x: features.adjoint(x, v), x)


def test_the_default_root_is_the_identity():
    network, _ = network_of("mlp")
    features = TangentFeatures(Tangent(network))
    assert features.root == IdentityRoot(features.num_features)


def test_unusable_arguments_are_refused():
    tangent = Tangent(nn.Linear(4, 2).double().eval(), memory_budget=1000)
    with pytest.raises(ValueError, match="root of 10 weights, found one of 3"):
        TangentFeatures(tangent, IdentityRoot(3))
    features = TangentFeatures(tangent, input_shape=(2, 2))
    with pytest.raises(ValueError, match=r"4 columns for inputs of shape \(2, 2\)"):
        features.features(normal(3, 5))
    features = TangentFeatures(tangent)
    with pytest.raises(ValueError, match="float64 on cpu"):
        features.forward(torch.ones(3, 4), normal(10, 1))
    with pytest.raises(ValueError, match="memory budget"):
        features.features(normal(30, 4))
