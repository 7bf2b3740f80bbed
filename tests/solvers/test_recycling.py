"""What a solve leaves behind: directions, grown preconditioners, residuals."""

from __future__ import annotations

import pytest
import torch

from sgdgp.solvers import CG, PivotedCholesky
from sgdgp.solvers.conjugate_gradients import BlockRecurrence
from sgdgp.solvers.preconditioners import Inverse
from sgdgp.solvers.recycling import (
    Collector,
    Directions,
    directions_to_keep,
    extend_inverse,
    leading_directions,
)
from sgdgp.solvers.sdd import SDD
from sgdgp.solvers.system import System, as_system
from tests.solvers.problems import problem

N, NEW = 90, 6


def grown():
    """A problem of N rows, and its system, the last NEW rows of which are new."""
    p = problem("scale", N, k=3, noise=1e-2)
    return p, as_system(p.operator, p.noise, p.rhs)


def random_directions(matrix, r, seed=0):
    """H-orthonormal directions and their images."""
    generator = torch.Generator().manual_seed(seed)
    d = torch.randn(len(matrix), r, generator=generator, dtype=matrix.dtype)
    factor = torch.linalg.cholesky(d.mT @ matrix @ d)
    d = torch.linalg.solve_triangular(factor, d.mT, upper=False).mT
    return Directions(d, matrix @ d)


class Exactly(Inverse):
    """The inverse of a matrix."""

    passes = 0.0

    def __init__(self, matrix):
        self.settings = {"rank": len(matrix)}
        self._inverse = torch.linalg.inv(matrix)

    def __call__(self, r):
        return self._inverse @ r


def test_directions_of_a_solve_are_conjugate_and_their_images_are_known():
    p = problem("scale", 200, k=3, noise=1e-3)
    solver = CG(tolerance=1e-10, preconditioner=None, recycle=10_000)
    found = p.solve(solver)
    kept = leading_directions(found.recycled.collected, 20)
    gram = kept.directions.mT @ p.matrix @ kept.directions
    torch.testing.assert_close(gram, torch.eye(20).to(gram), rtol=0, atol=1e-8)
    torch.testing.assert_close(
        kept.images, p.matrix @ kept.directions, rtol=1e-8, atol=1e-8
    )


def test_the_ones_kept_have_the_largest_ritz_values():
    p = problem("scale", 60, k=2, noise=1e-2)
    both = [random_directions(p.matrix, 7, seed) for seed in range(2)]
    pairs = tuple((d.directions, d.images) for d in both)
    basis = torch.linalg.qr(torch.cat([d.directions for d in both], dim=1)).Q
    # Ritz values of H in the inner product of H, over the span of all directions.
    pencil = torch.linalg.cholesky(basis.mT @ p.matrix @ basis)
    square = basis.mT @ p.matrix @ p.matrix @ basis
    inner = torch.linalg.solve_triangular(pencil, square, upper=False)
    inner = torch.linalg.solve_triangular(pencil, inner.mT, upper=False)
    kept = leading_directions(pairs, 4)
    found = torch.linalg.eigvalsh(kept.images.mT @ kept.images)
    torch.testing.assert_close(found, torch.linalg.eigvalsh(inner)[-4:])


def test_no_directions_are_found_among_zeros():
    nothing = torch.zeros(10, 3, dtype=torch.float64)
    assert leading_directions(((nothing, nothing),), 2) is None


def test_residuals_left_behind_are_those_of_the_weights():
    p = problem("scale", 200, k=3, noise=1e-3)
    found = p.solve(CG(tolerance=1e-6, recycle=5))
    left = p.rhs - p.matrix @ found.weights
    torch.testing.assert_close(found.recycled.residual, left, rtol=1e-6, atol=1e-12)


def test_nothing_is_kept_unless_asked_for():
    assert problem("scale", 50).solve(CG()).recycled is None


@pytest.mark.parametrize("limit", [1, 5, 6, 100])
def test_a_collector_keeps_the_latest_within_its_limit(limit):
    collector = Collector(limit)
    for number in range(5):
        pair = torch.full((4, 3), float(number))
        collector.add((pair, pair))
    kept = [int(pair[0][0, 0]) for pair in collector.pairs]
    assert kept == list(range(5))[len(range(5)) - min(5, limit // 3) :]


def test_directions_in_a_system_with_more_rows_have_its_images():
    p = problem("scale", N, noise=1e-2)
    small = random_directions(p.matrix[:-NEW, :-NEW], 5)
    known = small.with_rows(p.matrix[-NEW:, :-NEW] @ small.directions)
    torch.testing.assert_close(known.images, p.matrix @ known.directions)
    gram = known.directions.mT @ known.images
    torch.testing.assert_close(gram, torch.eye(5).to(gram), rtol=0, atol=1e-10)


def test_residuals_stay_orthogonal_to_what_is_known_and_directions_conjugate():
    p = problem("scale", 120, noise=1e-3)
    known = random_directions(p.matrix, 5)
    run = BlockRecurrence(
        lambda v: p.matrix @ v,
        torch.zeros_like(p.rhs),
        p.rhs.clone(),
        None,
        torch.ones(p.rhs.shape[1], dtype=torch.bool),
        known,
    )
    for step in range(6):
        # In the middle all residuals are evaluated anew.
        run.step(p.rhs if step == 3 else None)
        assert float((known.directions.mT @ run.residual).abs().max()) < 1e-9
        directions, _ = run.last
        assert float((known.images.mT @ directions).abs().max()) < 1e-7
        torch.testing.assert_close(run.residual, p.rhs - p.matrix @ run.weights)


def test_with_all_neighbours_appended_rows_complete_an_exact_inverse(monkeypatch):
    p, system = grown()
    monkeypatch.setattr(
        "sgdgp.solvers.recycling.default_neighbours", lambda n: system.n
    )
    inverse = extend_inverse(Exactly(p.matrix[:-NEW, :-NEW]), system, NEW)
    torch.testing.assert_close(
        inverse(p.rhs), torch.linalg.solve(p.matrix, p.rhs), rtol=1e-6, atol=1e-8
    )


def test_rows_appended_one_after_another_are_rows_appended_together(monkeypatch):
    p, system = grown()
    monkeypatch.setattr(
        "sgdgp.solvers.recycling.default_neighbours", lambda n: system.n
    )
    half = System(
        p.operator.permuted(torch.arange(N - 2)),
        system.noise[:-2],
        system.rhs[:-2],
        system.scale,
    )
    first = extend_inverse(Exactly(p.matrix[:-NEW, :-NEW]), half, NEW - 2)
    twice = extend_inverse(first, system, 2)
    once = extend_inverse(Exactly(p.matrix[:-NEW, :-NEW]), system, NEW)
    torch.testing.assert_close(twice(p.rhs), once(p.rhs), rtol=1e-6, atol=1e-8)


def test_a_preconditioner_knows_when_it_is_outgrown():
    p, system = grown()
    assert extend_inverse(Exactly(p.matrix[:40, :40]), system, N - 40).is_outgrown
    assert not extend_inverse(Exactly(p.matrix[:-NEW, :-NEW]), system, NEW).is_outgrown


def test_what_appended_rows_cost_is_counted():
    p, system = grown()
    inverse = extend_inverse(Exactly(p.matrix[:-NEW, :-NEW]), system, NEW)
    assert NEW / N < inverse.passes < 2.0


def test_only_conjugate_gradients_are_told_to_keep_directions():
    rhs = torch.zeros(1000, 5)
    kept = directions_to_keep(rhs, 2**30)
    assert CG().with_recycling(kept).recycle == kept > 0
    assert SDD().with_recycling(kept) == SDD()
    # A sixteenth of the budget for directions and images together.
    assert directions_to_keep(rhs, 16 * 2 * 1000 * 4 * 7) == 7


def test_conjugate_gradients_resume_from_what_is_known():
    p = problem("scale", 300, k=3, noise=1e-3)
    solver = CG(tolerance=1e-8, preconditioner=PivotedCholesky(20), recycle=10_000)
    cold = p.solve(solver)
    known = leading_directions(cold.recycled.collected, 30)
    other = torch.roll(p.rhs, 50, dims=0)
    system = as_system(p.operator, p.noise, other)
    inner = known.directions.mT @ system.rhs
    start, residual = known.directions @ inner, system.rhs - known.images @ inner
    warm = solver.resume(system, start, residual, cold.recycled.inverse, known)
    assert warm.reason == "converged"
    again = CG(tolerance=1e-8, preconditioner=PivotedCholesky(20)).solve(
        p.operator, p.noise, other
    )
    assert warm.passes < 0.8 * again.passes
    torch.testing.assert_close(
        warm.weights, torch.linalg.solve(p.matrix, other), rtol=1e-5, atol=1e-6
    )
