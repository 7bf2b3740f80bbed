"""Interleaved timing: every contender has a turn in every round."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

Clock: TypeAlias = Callable[[], float]
"""``time.process_time`` for CPU time of all threads, or ``time.perf_counter``."""

Turn: TypeAlias = Callable[[], float]
"""Does something and returns the seconds of one unit of it."""


def timed(run: Callable[[], object], calls: int, clock: Clock) -> Turn:
    """A turn of so many calls; its seconds are those of one call."""

    def turn() -> float:
        start = clock()
        for _ in range(calls):
            run()
        return (clock() - start) / calls

    return turn


def interleaved(turns: Mapping[str, Turn], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contender in every round.

    Contenders take turns, so that what disturbs the machine disturbs all of them.
    A first round, in which memory is touched and caches are filled, is not counted.

    Args:
        turns: The contenders.
        rounds: Rounds that are counted.
    """
    seconds: dict[str, list[float]] = {name: [] for name in turns}
    for i in range(rounds + 1):
        for name, turn in turns.items():
            taken = turn()
            if i > 0:
                seconds[name].append(taken)
    return seconds


def median(values: Sequence[float]) -> float:
    """The median; NaN of nothing."""
    return statistics.median(values) if values else float("nan")
