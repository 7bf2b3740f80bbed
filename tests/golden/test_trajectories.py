"""Every solver takes the course that it took before: history, reason, weights."""

from __future__ import annotations

import pytest

from tests.golden.recorded import assert_same, read
from tests.golden.trajectories import CASES

RECORDED = read("trajectories")


def test_every_case_is_recorded() -> None:
    assert CASES.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_solve_takes_its_recorded_course(name: str) -> None:
    found, recorded = CASES[name](), RECORDED[name]
    # Passes are counts divided by n^2: exact but for the order of their sum.
    for key in ("passes", "reason", "warnings", "said"):
        if key in recorded:
            assert_same(found[key], recorded[key], rtol=1e-10, where=key)
    # A residual of converged float64 weights is rounding below 1e-10.
    assert_same(found, recorded, rtol=1e-6, atol=1e-10, where=name)
