"""A seed gives the numbers that it gave in version 0.1.0."""

from __future__ import annotations

import pytest

from tests.golden.recorded import assert_same, read
from tests.golden.streams import CASES

RECORDED = read("streams")


def test_every_stream_is_recorded() -> None:
    assert CASES.keys() == RECORDED.keys()


@pytest.mark.parametrize("name", CASES)
def test_a_seed_gives_its_recorded_numbers(name: str) -> None:
    rtol = 1e-4 if "float32" in name else 1e-8
    assert_same(CASES[name](), RECORDED[name], rtol=rtol, atol=1e-11, where=name)
