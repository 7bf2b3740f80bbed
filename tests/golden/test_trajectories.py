"""Every solver takes the course that it took before: history, reason, weights."""

from __future__ import annotations

import pytest

from sgdgp.solvers import Auto
from sgdgp.solvers.auto import SOLVERS
from tests.golden.recorded import assert_same, read
from tests.golden.trajectories import CASES, Case

RECORDED = read("trajectories")


def test_every_case_is_recorded() -> None:
    assert CASES.keys() == RECORDED.keys()


def test_every_solver_has_a_case() -> None:
    cases = [case.solver for case in CASES.values() if isinstance(case, Case)]
    assert {type(solver) for solver in cases} >= {Auto, *SOLVERS.values()}


@pytest.mark.parametrize("name", CASES)
def test_a_solve_takes_its_recorded_course(name: str) -> None:
    found, recorded = CASES[name](), RECORDED[name]
    # Passes are counts divided by n^2: exact but for the order of their sum.
    for key in ("passes", "reason", "warnings", "said"):
        if key in recorded:
            assert_same(found[key], recorded[key], rtol=1e-10, where=key)
    # A residual of converged float64 weights is rounding below 1e-10.
    assert_same(found, recorded, rtol=1e-6, atol=1e-10, where=name)
