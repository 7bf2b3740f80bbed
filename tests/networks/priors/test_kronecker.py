"""Kronecker priors against dense products, of moments and of factors given."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sgdgp.networks import Kronecker
from sgdgp.networks.priors import KroneckerPrior, kronecker
from sgdgp.networks.priors.kronecker import LARGEST_FACTOR
from sgdgp.tangent import Tangent
from tests.networks.priors.family import (
    Curvature,
    dense_root,
    no_probes,
    stored,
)


def test_kronecker_is_the_inverse_of_the_moments_of_its_probes(tangent):
    curvature = Curvature.random(tangent.num_weights, batches=12)
    setting = Kronecker(probes=16, floor=1e-9)
    prior = setting.build(tangent, curvature.probes)
    covariance = prior.covariance(torch.eye(prior.num_weights).double().mT)
    expected = torch.zeros_like(covariance)
    probes = list(curvature.probes(16))
    for name, shape in zip(tangent.names, tangent.shapes, strict=True):
        s = tangent.slices[name]
        if len(shape) == 1:
            square = sum(p[s].square().mean(1) for p in probes)
            expected[s, s] = torch.diag(1 / square)
            continue
        m = [p[s].mT.reshape(16, shape[0], -1) for p in probes]
        rows = sum((x @ x.mT).mean(0) for x in m)
        columns = sum((x.mT @ x).mean(0) for x in m)
        expected[s, s] = torch.linalg.inv(torch.kron(rows, columns) / rows.trace())
    torch.testing.assert_close(covariance, expected, rtol=1e-8, atol=1e-9)


def test_kronecker_recovers_a_curvature_that_is_a_kronecker_product():
    tangent = Tangent(nn.Linear(4, 3, bias=False).double())
    g = torch.Generator().manual_seed(5)
    left = torch.randn(3, 3, generator=g).double()
    right = torch.randn(4, 4, generator=g).double()
    # All signs of a full set of rows: every probe is left E right, E of signs.
    rows = torch.kron(left, right).mT[None].expand(400, -1, -1)
    prior = Kronecker(probes=4, floor=1e-9).build(tangent, Curvature(rows).probes)
    exact = torch.linalg.inv(400 * torch.kron(left @ left.mT, right @ right.mT))
    found = prior.covariance(torch.eye(12).double())
    # 1,600 probes of 12 signs: moments are known to some 3 %, inverses to some 10 %.
    error = torch.linalg.matrix_norm(found - exact) / torch.linalg.matrix_norm(exact)
    assert float(error) < 0.15


def test_given_factors_are_the_covariance_of_their_matrix(tangent):
    g = torch.Generator().manual_seed(6)
    rows, rows2 = (_covariance(8, g) for _ in range(2))
    columns, columns2 = (_covariance(3, g) for _ in range(2))
    s = tangent.slices["first.weight"]
    eye = torch.eye(tangent.num_weights).double().mT
    for factors, truth in [
        ((rows, columns), torch.kron(rows, columns)),
        (
            [(rows, columns), (rows2, columns2)],
            torch.kron(rows, columns) + torch.kron(rows2, columns2),
        ),
        # A first term without full rank.
        (
            [(torch.diag(torch.arange(8.0)).double(), columns), (rows2, columns2)],
            torch.kron(torch.diag(torch.arange(8.0)).double(), columns)
            + torch.kron(rows2, columns2),
        ),
    ]:
        prior = Kronecker(factors={"first.weight": factors}).build(tangent, no_probes)
        expected = eye.clone()
        expected[s, s] = truth
        torch.testing.assert_close(
            prior.covariance(eye), expected, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(dense_root(prior).mT, prior.root_adjoint(eye))


@pytest.mark.parametrize(
    ("factors", "words"),
    [
        ({"first.wight": (torch.eye(8), torch.eye(3))}, "first.wight"),
        ({"first.bias": (torch.eye(8), torch.eye(1))}, "no matrix|none"),
        ({"first.weight": (torch.eye(3), torch.eye(8))}, "expected shapes"),
        ({"first.weight": (-torch.eye(8), torch.eye(3))}, "eigenvalue -1"),
        ({"first.weight": (torch.ones(8, 8).triu(), torch.eye(3))}, "symmetric"),
        ({"first.weight": [torch.eye(8)]}, "pairs"),
    ],
)
def test_factors_that_do_not_fit_are_refused(factors, words, tangent):
    with pytest.raises(ValueError, match=words):
        Kronecker(factors=factors).build(tangent, no_probes)


def test_a_long_side_has_a_diagonal_factor(monkeypatch, tangent):
    monkeypatch.setattr(kronecker, "LARGEST_FACTOR", 4)
    curvature = Curvature.random(tangent.num_weights)
    prior = Kronecker(probes=8).build(tangent, curvature.probes)
    assert isinstance(prior, KroneckerPrior)
    blocks = dict(zip(tangent.names, prior.blocks, strict=True))
    assert blocks["first.weight"].left.shape == (8,)
    assert blocks["first.weight"].right.shape == (3, 3)
    root = dense_root(prior)
    z = torch.randn(2, prior.num_weights, dtype=torch.float64).mT
    torch.testing.assert_close(prior.root_adjoint(z), root.mT @ z)
    assert LARGEST_FACTOR == 4096


def test_a_sum_of_two_terms_is_stored_too(tangent):
    pair = (torch.eye(8).double(), 2 * torch.eye(3).double())
    setting = Kronecker(factors={"first.weight": [pair, pair]})
    prior = setting.build(tangent, no_probes)
    assert torch.equal(dense_root(stored(prior)), dense_root(prior))


def _covariance(n: int, generator: torch.Generator) -> Tensor:
    a = torch.randn(n, n + 2, generator=generator).double()
    return a @ a.mT / n
