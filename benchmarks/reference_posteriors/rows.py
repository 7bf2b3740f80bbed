"""What is measured: a row has figures of a seed, and says what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.checks import Check

Record: TypeAlias = dict[str, Any]
"""Figures of one seed, as they lie in a file."""


@dataclass(frozen=True)
class Row:
    """One experiment.

    Attributes:
        measure: From a seed to its figures.
        checks: From the figures of all seeds to what is asked of them.
        seeds: Which are run unless others are asked for.
    """

    measure: Callable[[int], Record]
    checks: Callable[[Sequence[Record]], Iterable[Check]]
    seeds: tuple[int, ...] = (0,)
