"""Streams that are derived from a seed have names, and a list that is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

import sgdgp
from sgdgp.core.seeds import (
    STREAMS,
    derived_generator,
    generator_of,
    number_of,
    seed_of,
)

DERIVE = {"derived_generator", "Noise.drawn"}
"""Functions whose second argument is the name of a stream."""


def names_in_use() -> set[str]:
    """Names of streams that are written anywhere in the package."""
    return {
        node.args[1].value
        for path in Path(sgdgp.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in DERIVE
        and isinstance(node.args[1], ast.Constant)
    }


def test_the_list_has_every_stream_and_no_other():
    assert names_in_use() == set(STREAMS)


def test_streams_differ_and_are_repeated():
    seeds = [seed_of(derived_generator(0, name)) for name in STREAMS]
    assert len(set(seeds)) == len(STREAMS)
    assert seeds == [seed_of(derived_generator(0, name)) for name in STREAMS]
    assert seed_of(derived_generator(1, "update")) != seed_of(
        derived_generator(0, "update")
    )


@pytest.mark.parametrize("function", [generator_of, number_of])
def test_seeds_are_checked_alike_wherever_they_are_given(function):
    for seed in (2**64, -(2**63) - 1):
        with pytest.raises(ValueError, match="seed: expected an integer of 64 bits"):
            function(seed)
    for seed in (1.5, "1", True, None):
        with pytest.raises(TypeError, match="seed: "):
            function(seed)
    assert number_of(np.int64(3)) == 3
    assert seed_of(generator_of(np.uint8(3))) == seed_of(generator_of(3))
