"""Files that version 0.1.0 wrote are read, and give what they gave then."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.files import KINDS, file_of
from tests.golden.make import used
from tests.golden.recorded import DATA, ROUNDING, assert_same, read

RECORDED = read("files")

TIES = {"thompson low rank"}
"""Rounding decides between two maxima that are alike; what follows then differs."""


def test_every_kind_has_a_file_and_every_file_a_kind() -> None:
    assert KINDS.keys() == RECORDED.keys()
    firsts = [file_of(name) for name in KINDS]
    found = [place.name for place in (DATA / "files").iterdir()]
    assert set(firsts) <= set(found)
    assert all(any(name.startswith(first) for first in firsts) for name in found)


@pytest.mark.parametrize("name", KINDS)
def test_a_stored_file_gives_what_it_gave(name: str, tmp_path: Path) -> None:
    # Where weights are in float64 a residual below 1e-12 is rounding.
    found = used(name, tmp_path)
    if ROUNDING and name in TIES:
        assert found.keys() == RECORDED[name].keys()
        return
    assert_same(found, RECORDED[name], rtol=KINDS[name].rtol, atol=1e-12, where=name)
