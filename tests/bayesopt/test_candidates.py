"""Where candidates lie."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgdgp.bayesopt.candidates import Candidates, best_candidates, cumulated_scores

BOX = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
POINTS = torch.tensor([[0.5, 1.0], [0.2, 0.4], [0.8, 1.8]], dtype=torch.float64)


def drawn(count, seed=0, **settings):
    settings = {"exploration": 0.0, "nearby": torch.full((2,), 1e-9), **settings}
    candidates = Candidates(BOX, **settings)
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(list(candidates.draw(count, generator)))


def shares(y, count=20_000):
    """How often candidates were drawn near each point."""
    found = drawn(count, x=POINTS, cumulated=cumulated_scores(y))
    return (torch.cdist(found, POINTS) < 1e-6).double().mean(0)


def test_points_are_drawn_in_proportion_to_what_they_are_above_the_smallest():
    expected = torch.tensor([0.0, 0.25, 0.75]).double()
    # Four standard errors of a share of 20,000.
    limit = 4 * (0.25 * 0.75 / 20_000) ** 0.5
    for y in ([-2.0, -1.0, 1.0], [5.0, 6.0, 8.0]):
        assert (shares(torch.tensor(y)) - expected).abs().max() < limit


def test_equal_values_are_drawn_equally():
    assert (shares(torch.full((3,), -7.0)) - 1 / 3).abs().max() < 0.014


def test_the_share_of_uniform_candidates_is_as_asked():
    found = drawn(
        20_000, exploration=0.3, x=POINTS, cumulated=cumulated_scores(torch.ones(3))
    )
    near = (torch.cdist(found, POINTS) < 1e-6).any(1).double().mean()
    assert abs(near - 0.7) < 4 * (0.3 * 0.7 / 20_000) ** 0.5


def test_perturbations_have_the_standard_deviations_asked_for():
    nearby = torch.tensor([0.02, 0.1]).double()
    found = drawn(20_000, nearby=nearby, x=POINTS[:1], cumulated=torch.ones(1).double())
    spread = (found - POINTS[0]).square().mean(0).sqrt()
    # A standard deviation of 20,000 normals has a relative standard error of 0.5 %.
    assert ((spread / nearby) - 1).abs().max() < 0.02


def test_without_points_all_candidates_are_uniform():
    found = drawn(20_000)
    quantiles = found.sort(0).values / BOX[1]
    even = torch.linspace(0, 1, len(found)).double().unsqueeze(1)
    # Kolmogorov and Smirnov: exceeded with probability 3e-5.
    assert (quantiles - even).abs().max() < 2.3 / len(found) ** 0.5


@given(st.integers(1, 9000), st.floats(0, 1), st.floats(1e-3, 10))
def test_all_candidates_are_in_the_box_and_as_many_as_asked_for(count, share, nearby):
    found = drawn(
        count,
        exploration=share,
        nearby=torch.full((2,), nearby).double(),
        x=POINTS,
        cumulated=cumulated_scores(torch.arange(3.0)),
    )
    assert found.shape == (count, 2)
    assert bool(((found >= BOX[0]) & (found <= BOX[1])).all())


@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("count", [1, 4])
def test_the_best_candidates_of_every_function_are_kept(rows, count):
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(2, 5, generator=generator)
    x = torch.randn(60, 2, generator=generator)

    class Linear:
        num_functions = 5

        def __call__(self, x):
            return (x @ weights).mT

        def each(self, x):
            return x.sum(-1)

    found = best_candidates(Linear(), iter(x.split(25)), count, rows)
    values = torch.einsum("skd,ds->sk", found, weights)
    expected = (x @ weights).mT.topk(count, 1).values
    torch.testing.assert_close(values.sort(1, descending=True).values, expected)
