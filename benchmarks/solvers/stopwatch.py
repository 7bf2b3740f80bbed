"""A clock of wall and CPU time that can be stopped while a result is looked at."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

_Moment: TypeAlias = tuple[float, float]
"""Wall and CPU time of all threads, in seconds."""


class Stopwatch:
    """Runs from its construction; what happens inside ``paused`` does not count."""

    def __init__(self) -> None:
        self._start = _now()
        self._stopped: _Moment | None = None

    @property
    def seconds(self) -> float:
        """Wall time so far, without the pauses."""
        return (self._stopped or _now())[0] - self._start[0]

    @property
    def cpu_seconds(self) -> float:
        """CPU time of all threads so far, without the pauses."""
        return (self._stopped or _now())[1] - self._start[1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Off the clock; a pause within a pause is one pause."""
        if self._stopped is not None:
            yield
            return
        self._stopped = before = _now()
        try:
            yield
        finally:
            after = _now()
            # As if the clock had been started later.
            self._start = (
                self._start[0] + after[0] - before[0],
                self._start[1] + after[1] - before[1],
            )
            self._stopped = None


def _now() -> _Moment:
    return time.perf_counter(), time.process_time()
