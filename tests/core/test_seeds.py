"""Streams that are derived from a seed have names, and a list that is complete."""

from __future__ import annotations

import ast
from pathlib import Path

import sgdgp
from sgdgp.core.seeds import STREAMS, derived_generator, seed_of

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
