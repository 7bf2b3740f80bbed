"""Maxima of functions whose maxima are known, and of posterior functions."""

from __future__ import annotations

import sys

import pytest
import torch
from gpytorch.kernels import LinearKernel, MaternKernel, RBFKernel, ScaleKernel
from hypothesis import given
from hypothesis import strategies as st

import sgdgp
from sgdgp.bayesopt import maximise, maximize
from sgdgp.bayesopt.maximise import (
    Candidates,
    ascend,
    best_candidates,
    cumulated_scores,
    value_and_slope,
)
from tests.models import GP

BOX = torch.tensor([[0.0, -1.0], [2.0, 1.0]], dtype=torch.float64)


class Bumps:
    """f_i(x) = i - |x - centre_i|^2, as functions of the protocol."""

    def __init__(self, centres):
        self.centres = centres
        self.points = []

    @property
    def num_functions(self):
        return len(self.centres)

    def __call__(self, x):
        self.points.append(x)
        return self.each(x.expand(self.num_functions, -1, -1))

    def each(self, x):
        offsets = torch.arange(self.num_functions).to(x).unsqueeze(1)
        return offsets - (x - self.centres.unsqueeze(1)).square().sum(-1)


def posterior(n=150, num_samples=6, kernel=None, dtype=torch.float64, **settings):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 2, generator=generator, dtype=torch.float64).to(dtype)
    x = BOX[0].to(dtype) + x * (BOX[1] - BOX[0]).to(dtype)
    y = torch.sin(4 * x[:, 0]) * torch.cos(3 * x[:, 1])
    model = GP(x, y, kernel or ScaleKernel(MaternKernel(nu=1.5))).to(dtype)
    model.likelihood.noise = 1e-2
    return sgdgp.condition(
        model, num_samples=num_samples, num_features=256, progress=False, **settings
    )


def test_maxima_inside_the_box_are_found():
    centres = torch.tensor([[0.3, 0.2], [1.7, -0.6], [1.0, 0.9]]).double()
    maxima = maximise(Bumps(centres), BOX, 64, rounds=4)
    torch.testing.assert_close(maxima.x, centres, rtol=0, atol=3e-3)
    torch.testing.assert_close(
        maxima.values, torch.arange(3).double(), rtol=0, atol=1e-5
    )


def test_maxima_outside_of_the_box_are_found_on_its_boundary():
    centres = torch.tensor([[3.0, 0.5], [-1.0, -5.0]]).double()
    maxima = maximise(Bumps(centres), BOX, 64, rounds=4)
    expected = torch.tensor([[2.0, 0.5], [0.0, -1.0]]).double()
    torch.testing.assert_close(maxima.x, expected, rtol=0, atol=3e-3)


def test_maxima_of_posterior_functions_are_those_of_a_fine_grid():
    given = posterior()
    maxima = maximise(given, BOX, 256, rounds=5)
    sides = [torch.linspace(*BOX[:, i].tolist(), 151).double() for i in range(2)]
    grid = torch.cartesian_prod(*sides)
    best = given.functions(grid).amax(1)
    assert bool((maxima.values >= best - 5e-3).all())
    # The functions are smooth on the scale of the grid.
    assert bool((maxima.values <= best + 0.02).all())


def test_values_are_those_of_the_functions_at_the_points():
    given = posterior()
    maxima = maximise(given, BOX, 64, rounds=2, steps=10)
    values = given.functions.each(maxima.x.unsqueeze(1))[:, 0]
    torch.testing.assert_close(maxima.values, values)


@pytest.mark.parametrize("learning_rate", [0.2, 1e3])
def test_no_maximum_is_below_its_best_candidate(learning_rate):
    given = posterior()
    maxima = maximise(given, BOX, 32, rounds=2, steps=7, learning_rate=learning_rate)
    candidates = maximise(given, BOX, 32, rounds=2, steps=0)
    torch.testing.assert_close(maxima.candidate_values, candidates.values)
    assert bool((maxima.values >= maxima.candidate_values).all())
    assert bool((maxima.x >= BOX[0]).all())
    assert bool((maxima.x <= BOX[1]).all())


def test_memory_and_seed_decide_what_they_should():
    given = posterior(num_samples=9)
    first = maximise(given, BOX, 200, rounds=2, steps=5, seed=3)
    # 4,000 bytes: a few candidates and one function at a time.
    frugal = maximise(given, BOX, 200, rounds=2, steps=5, seed=3, memory_budget=4000)
    torch.testing.assert_close(frugal.x, first.x)
    generator = torch.Generator().manual_seed(3)
    again = maximise(given, BOX, 200, rounds=2, steps=5, seed=generator)
    assert torch.equal(again.x, first.x)
    other = maximise(given, BOX, 200, rounds=2, steps=5, seed=4)
    assert not torch.equal(other.x, first.x)


def test_candidates_are_evaluated_a_budget_at_a_time():
    functions = Bumps(torch.rand(5, 2).double())
    maximise(functions, BOX, 100, rounds=1, steps=0, memory_budget=2 * 8 * 5 * 8 * 10)
    assert [len(points) for points in functions.points] == [10] * 10


def test_more_starts_are_no_worse():
    given = posterior()
    one, three = (
        maximise(given, BOX, 64, rounds=2, steps=0, starts=starts) for starts in (1, 3)
    )
    torch.testing.assert_close(one.values, three.values)


def test_functions_drawn_later_and_some_of_them_can_be_maximised():
    given = posterior()
    settings = {"rounds": 2, "steps": 3, "nearby": 0.2}
    data = {"x": given.problem.x, "y": given.problem.targets}
    drawn = given.draw(3, seed=5)
    assert maximise(drawn, BOX, 32, **settings, **data).x.shape == (3, 2)
    some = maximise(given.functions.subset([4, 1]), BOX, 32, **settings, **data)
    everything = maximise(given.functions, BOX, 32, **settings, **data)
    torch.testing.assert_close(some.x, everything.x[[4, 1]])


def test_float32_works():
    maxima = maximise(posterior(dtype=torch.float32), BOX.float(), 64, rounds=2)
    assert maxima.x.dtype == maxima.values.dtype == torch.float32


def test_kernels_without_a_closed_form_work():
    given = posterior(kernel=ScaleKernel(RBFKernel()) + LinearKernel())
    maxima = maximise(given, BOX, 64, rounds=2, steps=10)
    assert bool((maxima.values > maxima.candidate_values).any())


class Refuses(Bumps):
    """Functions without gradients."""

    def each(self, x):
        if x.requires_grad:
            raise ValueError("no gradient")
        return super().each(x)


def test_functions_without_gradients_are_refused_before_any_work():
    functions = Refuses(torch.rand(2, 2).double())
    with pytest.raises(ValueError, match="no gradient"):
        maximise(functions, BOX)
    assert not functions.points
    assert maximise(functions, BOX, 16, rounds=1, steps=0).x.shape == (2, 2)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_candidates": 0}, "num_candidates"),
        ({"rounds": 0}, "rounds"),
        ({"starts": 0}, "starts"),
        ({"steps": -1}, "steps"),
        ({"exploration": 1.1}, "exploration"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"nearby": -1.0}, "nearby"),
        ({"nearby": torch.ones(3)}, "nearby.*2 of them"),
        ({"x": torch.zeros(3, 2).double()}, "both"),
        ({"x": torch.zeros(3, 2), "y": torch.zeros(3)}, "dtype"),
        ({"x": torch.zeros(3, 2).double(), "y": torch.zeros(4)}, r"\(3,\)"),
        ({"bounds": BOX.flip(0)}, "lower <= upper"),
        ({"bounds": BOX[:1]}, r"\(2, d\)"),
        ({"bounds": BOX * torch.inf}, "finite"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"memory_budget": "s"}, "memory_budget"),
        ({"exploration": "a"}, "exploration"),
        ({"learning_rate": "a"}, "learning_rate"),
        ({"progress": 1}, "progress"),
    ],
)
def test_arguments_that_do_not_fit_are_named(settings, words):
    functions = Bumps(torch.rand(2, 2).double())
    with pytest.raises((TypeError, ValueError), match=words):
        maximise(**{"posterior": functions, "bounds": BOX, **settings})


@pytest.mark.parametrize(
    ("settings", "is_terminal", "shows"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"progress": True}, False, True),
        ({"progress": False}, True, False),
    ],
)
def test_by_default_there_is_a_bar_on_a_terminal_only(
    settings, is_terminal, shows, monkeypatch, capsys
):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    maximise(Bumps(torch.rand(2, 2).double()), BOX, 8, rounds=1, steps=0, **settings)
    assert ("maximise" in capsys.readouterr().err) is shows


def test_it_is_known_by_both_spellings():
    assert maximize is maximise


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="num_functions"):
        maximise(torch.sin, BOX)
    with pytest.raises(ValueError, match="no samples"):
        maximise(posterior(num_samples=0), BOX)


SQUARE = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)
RATES = torch.full((2,), 0.2).double()


class Waves:
    """f_i(x) = cos(5 x_1 + i) + cos(5 x_2) - |x|^2, with a count of evaluations."""

    def __init__(self, count):
        self.num_functions = count
        self.evaluated = []

    def __call__(self, x):
        return self.each(x.expand(self.num_functions, -1, -1))

    def each(self, x):
        self.evaluated.append(x.shape[1])
        shift = torch.arange(self.num_functions).to(x).unsqueeze(1)
        waves = torch.cos(5 * x[..., 0] + shift) + torch.cos(5 * x[..., 1])
        return waves - x.square().sum(-1)


def starts(functions, count):
    generator = torch.Generator().manual_seed(0)
    shape = (functions.num_functions, count, 2)
    return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1


def test_the_highest_of_several_maxima_is_found():
    functions = Waves(3)
    found = ascend(functions, starts(functions, 30), SQUARE, RATES, steps=60)
    line = torch.linspace(-1, 1, 2001).double()
    shift = torch.arange(3).double().unsqueeze(1)
    best = (torch.cos(5 * line + shift) - line.square()).amax(1) + 1
    torch.testing.assert_close(found.values, best, rtol=0, atol=1e-3)


def test_the_gradient_vanishes_at_what_is_found():
    functions = Waves(3)
    found = ascend(functions, starts(functions, 5), SQUARE, RATES, steps=200)
    _, slope = value_and_slope(functions, found.x.unsqueeze(1))
    assert slope.abs().max() < 1e-3


def test_points_are_given_up_on_the_way():
    functions = Waves(2)
    ascend(functions, starts(functions, 30), SQUARE, RATES, steps=60)
    assert functions.evaluated[:7] == [30] * 7
    assert functions.evaluated[16:31] == [3] * 15
    assert functions.evaluated[31:] == [1] * 30
    assert len(functions.evaluated) == 61


def test_without_steps_the_best_start_is_returned():
    functions = Waves(2)
    x = starts(functions, 9)
    found = ascend(functions, x, SQUARE, RATES, steps=0)
    assert torch.equal(found.values, functions.each(x).amax(1))
    assert torch.equal(found.values, found.candidate_values)
    assert torch.equal(functions.each(found.x.unsqueeze(1))[:, 0], found.values)


def test_a_start_at_a_maximum_stays_there():
    functions = Waves(1)
    x = torch.zeros(1, 1, 2).double()
    found = ascend(functions, x, SQUARE, RATES, steps=10)
    assert torch.equal(found.x, x[:, 0])


TALL = torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
POINTS = torch.tensor([[0.5, 1.0], [0.2, 0.4], [0.8, 1.8]], dtype=torch.float64)


def drawn(count, seed=0, **settings):
    settings = {"exploration": 0.0, "nearby": torch.full((2,), 1e-9), **settings}
    candidates = Candidates(TALL, **settings)
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
    quantiles = found.sort(0).values / TALL[1]
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
    assert bool(((found >= TALL[0]) & (found <= TALL[1])).all())


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
