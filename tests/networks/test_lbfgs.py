"""L-BFGS for many problems at once."""

from __future__ import annotations

import pytest
import torch

from sgdgp.networks.lbfgs import Pairs, minimise


def quadratics(dtype=torch.float64, count=5, size=12):
    """Values and gradients of quadratics, one of them harder, and their minima."""
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(count, size, size, generator=generator, dtype=torch.float64)
    roots[2] *= torch.logspace(0, 1, size, dtype=torch.float64)
    matrices = (roots @ roots.mT / size + torch.eye(size, dtype=torch.float64)).to(
        dtype
    )
    minima = torch.randn(count, size, generator=generator, dtype=torch.float64)
    minima = minima.to(dtype)
    calls = []

    def objective(rows, points):
        calls.append(rows)
        away = points - minima[rows]
        gradients = torch.einsum("kij,kj->ki", matrices[rows], away)
        values = 0.5 * (away * gradients).sum(1) + 1e3
        return values, gradients, values.new_full((len(rows),), 1e-3)

    return objective, minima, calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_problem_reaches_its_own_minimum(dtype):
    objective, minima, calls = quadratics(dtype)
    pairs = Pairs(len(minima), 10, minima)
    found = minimise(objective, torch.zeros_like(minima), steps=300, pairs=pairs)
    assert bool(found.converged.all())
    torch.testing.assert_close(found.points, minima, rtol=0, atol=2e-3)
    # Those that are done are not evaluated any more.
    assert len(calls[-1]) < len(minima)


def test_what_is_known_of_a_hessian_saves_steps():
    objective, minima, _ = quadratics()
    pairs = Pairs(len(minima), 30, minima)
    start = torch.zeros_like(minima)
    first = minimise(objective, start, steps=300, pairs=pairs)
    again = minimise(objective, -first.points, steps=300, pairs=pairs)
    assert bool(again.converged.all())
    assert again.steps < 0.7 * first.steps


def test_the_newest_pair_of_a_problem_stays_so_while_others_go_on():
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    changes = steps * torch.arange(1, 7)
    pairs, both = Pairs(2, 3, steps), torch.arange(2)
    for i in range(3):
        pairs.add(both, steps[i].expand(2, -1), changes[i].expand(2, -1))
    for i in (3, 4):
        pairs.add(both[:1], steps[i, None], changes[i, None])
    # The secant equation is that of each problem's last step.
    torch.testing.assert_close(pairs.product(both, changes[[4, 2]]), steps[[4, 2]])


def test_a_budget_that_is_too_small_is_said():
    objective, minima, _ = quadratics()
    pairs = Pairs(len(minima), 10, minima)
    found = minimise(objective, torch.zeros_like(minima), steps=3, pairs=pairs)
    assert found.steps == 3
    assert not bool(found.converged[2])


def test_a_problem_without_descent_is_given_up():
    def objective(rows, points):
        return points.sum(1), -torch.ones_like(points), points.new_zeros(len(rows))

    start = torch.zeros(2, 3)
    found = minimise(objective, start, steps=50, pairs=Pairs(2, 4, start))
    assert found.steps == 2
    assert not bool(found.converged.any())
    torch.testing.assert_close(found.points, start)
