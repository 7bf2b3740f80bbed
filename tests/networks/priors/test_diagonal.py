"""The g-prior against the exact diagonal of the curvature."""

from __future__ import annotations

import pytest

from sgdgp.networks import GPrior
from sgdgp.networks.priors import DiagonalPrior
from tests.networks.priors.family import (
    Curvature,
)


def test_g_prior_estimates_the_diagonal_of_the_curvature(tangent):
    curvature = Curvature.random(tangent.num_weights)
    count = 64
    prior = GPrior(probes=count, floor=1e-12).build(tangent, curvature.probes)
    assert isinstance(prior, DiagonalPrior)
    assert curvature.asked == [count]
    exact = curvature.matrix.diagonal()
    # q = a^T e with signs e: Var q^2 = 2 |a|^4 - 2 sum a_i^4.
    squares = curvature.rows.square()
    variance = 2 * (squares.sum(1).square() - squares.square().sum(1)).sum(0) / count
    z = (prior.scales**-2 - exact) / variance.sqrt()
    assert float(z.abs().max()) < 5
    # 30 products of two signs of one batch make all errors: 1 with error 0.26.
    assert 0.2 < float(z.square().mean()) < 2.0


def test_entries_below_the_floor_are_lifted_to_it(tangent):
    curvature = Curvature.random(tangent.num_weights)
    s = tangent.slices["first.weight"]
    curvature.rows[..., s.start] = 0
    prior = GPrior(floor=0.01).build(tangent, curvature.probes)
    own = prior.scales[s] ** -2
    # The floor is of the median of those that are not zero.
    assert float(own[0]) == pytest.approx(0.01 * float(own[1:].median()))
    assert float(own.min()) >= 0.99 * float(own[0])
