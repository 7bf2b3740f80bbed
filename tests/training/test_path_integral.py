import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from sgdgp.training.path_integral import PathIntegral


def quadratic(seed):
    """A quadratic of a (3,) and a 0-dim parameter, and its gradient."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    linear = torch.randn(4, generator=generator, dtype=torch.float64)

    def value(p, q):
        z = torch.cat([p, q.unsqueeze(0)])
        return float(linear @ z - 0.5 * (root @ z).square().sum())

    def gradient(p, q):
        z = torch.cat([p, q.unsqueeze(0)])
        slope = linear - root.T @ (root @ z)
        return [slope[:3], slope[3]]

    return value, gradient


def point(seed):
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(4, generator=generator, dtype=torch.float64)
    return [drawn[:3], drawn[3]]


@hypothesis.given(st.integers(0, 10**6), st.integers(1, 6), st.floats(-5, 5))
def test_quadratics_are_exact_along_any_path(seed, steps, start):
    value, gradient = quadratic(seed)
    path = PathIntegral(start)
    first = point(seed)
    for i in range(steps + 1):
        here = point(seed + i)
        found = path.move(here, gradient(*here))
        assert found == pytest.approx(
            start + value(*here) - value(*first), rel=1e-9, abs=1e-9
        )


def test_the_error_of_a_smooth_function_is_of_third_order_in_the_step():
    def error(steps):
        path = PathIntegral(math.sin(0.0))
        for t in torch.linspace(0.0, 1.5, steps + 1, dtype=torch.float64):
            found = path.move([t], [t.cos()])
        return abs(found - math.sin(1.5))

    # Third order in one step, so second over a path of given length.
    assert error(20) / error(40) == pytest.approx(4.0, rel=0.02)


def test_points_and_gradients_are_copied():
    path, p, g = PathIntegral(), torch.zeros(1), torch.ones(1)
    path.move([p], [g])
    p += 2.0
    g += 2.0
    assert path.move([p], [g]) == pytest.approx(4.0)


def test_a_gradient_that_is_not_finite_leaves_the_path_where_it_was():
    path = PathIntegral(1.0)
    path.move([torch.zeros(1)], [torch.ones(1)])
    for bad in (math.nan, math.inf):
        assert math.isnan(path.move([torch.full((1,), 9.0)], [torch.tensor([bad])]))
    assert path.value == 1.0
    assert path.move([torch.ones(1)], [torch.ones(1)]) == pytest.approx(2.0)


def test_a_parameter_at_minus_infinity_that_stays_adds_nothing():
    path, bound = PathIntegral(1.0), torch.tensor([-math.inf, 0.0])
    path.move([bound], [torch.tensor([0.0, 1.0])])
    moved = bound + torch.tensor([0.0, 0.5])
    assert path.move([moved], [torch.tensor([0.0, 1.0])]) == pytest.approx(1.5)


def test_state_holds_everything():
    path = PathIntegral(0.25)
    path.move([torch.zeros(2), torch.tensor(1.0)], [torch.ones(2), torch.tensor(2.0)])
    again = PathIntegral.from_state(path.state())
    here = [torch.ones(2), torch.tensor(0.5)]
    slope = [torch.zeros(2), torch.tensor(0.0)]
    assert again.move(here, slope) == path.move(here, slope)
