"""PAC-Bayes bounds against closed forms, each other, and coins."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal, kl_divergence

from sgdgp.networks.bounds import (
    CATONI,
    binary_kl,
    catoni_bound,
    gaussian_kl,
    inverse_kl,
    inverse_kl_bound,
    mcallester_bound,
    mean_bound,
)
from tests.networks.dense import columns
from tests.networks.priors.members import MEMBERS, NUM_WEIGHTS

BOUNDS = [inverse_kl_bound, mcallester_bound, catoni_bound]
RISKS = st.floats(0, 1)


@pytest.mark.parametrize(
    ("name", "other"),
    [(a, b) for a, b in product(MEMBERS, MEMBERS) if "full" not in (a, b)][::3],
)
def test_the_divergence_of_every_pair_is_that_of_dense_gaussians(name, other):
    (q, dense_q), (p, dense_p) = MEMBERS[name](), MEMBERS[other]()
    zero, shift = torch.zeros(NUM_WEIGHTS).double(), columns(NUM_WEIGHTS, 1)
    one = MultivariateNormal(shift[:, 0], precision_matrix=dense_q)
    two = MultivariateNormal(zero, precision_matrix=dense_p)
    found = gaussian_kl(q, p, shift)
    assert found.value == pytest.approx(float(kl_divergence(one, two)), rel=1e-8)
    assert found.standard_error == 0


@pytest.mark.parametrize("name", MEMBERS)
def test_a_gaussian_is_no_way_from_itself(name):
    prior, _ = MEMBERS[name]()
    assert abs(gaussian_kl(prior, prior).value) < 1e-8 * NUM_WEIGHTS


@given(RISKS, st.floats(0, 20))
def test_the_inverse_of_the_binary_divergence(r, budget):
    p = inverse_kl(r, budget)
    assert r <= p <= 1
    assert binary_kl(r, p) >= budget * (1 - 1e-9) - 1e-12 or p == 1
    if r < p < 1:
        assert binary_kl(r, r + (p - r) * (1 - 1e-9)) <= budget * (1 + 1e-9) + 1e-12


@given(RISKS, st.floats(0, 1e4), st.integers(1, 10**6), st.floats(1e-6, 0.9))
def test_the_inverse_is_never_above_mcallester_and_no_bound_below_the_risk(
    risk, kl, n, delta
):
    found = [bound(risk, kl, n, delta) for bound in BOUNDS]
    assert found[0] <= found[1] + 1e-12
    # Catoni's is the inverse with another term for delta, at its best c.
    budget = (kl + math.log(len(CATONI) / delta)) / n
    assert found[2] >= inverse_kl(risk, budget) - 1e-9
    for value, bound in zip(found, BOUNDS, strict=True):
        assert risk <= value <= 1
        assert bound(risk, kl + 1, n, delta) >= value
        assert bound(risk, kl, n, delta / 2) >= value


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("p", [0.02, 0.3])
def test_a_coin_breaks_its_bound_no_more_often_than_told(bound, p):
    n, delta, runs = 50, 0.2, 2000
    g = torch.Generator().manual_seed(0)
    heads = torch.rand(runs, n, generator=g).lt(p).double().mean(1).tolist()
    broken = sum(bound(r, 0.0, n, delta) < p for r in heads) / runs
    assert broken <= delta
    assert max(bound(r, 0.0, n, delta) for r in heads) < 1


@pytest.mark.parametrize("bound", BOUNDS)
def test_what_is_no_risk_is_refused(bound):
    for risk, kl, n, delta, words in [
        (1.2, 0.0, 5, 0.1, "losses in"),
        (math.nan, 0.0, 5, 0.1, "losses in"),
        (0.1, -1.0, 5, 0.1, "no negative"),
        (0.1, math.nan, 5, 0.1, "no negative"),
        (0.1, 1.0, 0, 0.1, "at least one example"),
        (0.1, 1.0, 5, 1.0, "a probability"),
    ]:
        with pytest.raises(ValueError, match=words):
            bound(risk, kl, n, delta)
    with pytest.raises(ValueError, match="positive"):
        catoni_bound(0.1, 1.0, 5, 0.1, c=[])


@pytest.mark.parametrize("width", [1.0, 0.05])
def test_a_mean_is_above_its_bound_no_more_often_than_told(width):
    """Of coins, and of numbers that hardly differ, of which less is uncertain."""
    k, delta, runs, p = 200, 0.2, 300, 0.3
    g = torch.Generator().manual_seed(0)
    coins = torch.rand(runs, k, generator=g).lt(p).double()
    values = p + width * (coins - p)
    found = [mean_bound(row, delta) for row in values]
    assert sum(bound < p for bound in found) / runs <= delta
    wide = inverse_kl(p, math.log(2 / delta) / k)
    assert sum(found) / runs < (
        wide + 0.01 if width == 1 else p + 0.3 * (wide - p) + 0.03
    )
    with pytest.raises(ValueError, match="two draws"):
        mean_bound(values[0, :1], delta)
    with pytest.raises(ValueError, match="losses in"):
        mean_bound(values[0] + 1, delta)
