"""What every peer hands back and its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.trainable import Learnt

_HISTORY = 64


class Clock:
    """Wall and CPU seconds by phase, and the limit of the training.

    Args:
        max_seconds: Wall seconds after which ``expired`` is True. Default: never.
    """

    def __init__(self, max_seconds: float | None = None) -> None:
        self._max_seconds = max_seconds
        self._start = time.perf_counter()
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a phase; the limit counts from the start of the latest one."""
        self._start, cpu = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = self.elapsed
        self.cpu_seconds[name] = time.process_time() - cpu

    @property
    def elapsed(self) -> float:
        """Wall seconds since the phase began."""
        return time.perf_counter() - self._start

    @property
    def expired(self) -> bool:
        """Whether the phase has used up the limit."""
        return self._max_seconds is not None and self.elapsed >= self._max_seconds


@dataclass(frozen=True)
class PeerOutcome:
    """Predictions of the test rows and how they came about.

    Attributes:
        mean: Of the test targets (m,).
        variance: Of the test targets, noise included (m,); None if there is none.
        learnt: Hyperparameters.
        steps: Steps done: optimiser steps, or evaluations for scikit-learn.
        reason: Why the training ended.
        seconds: Wall seconds by phase.
        cpu_seconds: CPU seconds by phase.
        settings: What the figures depend on.
        rows: Training rows used.
        history: Entries of step, seconds and loss.
        warnings: What a reader of the figures has to know.
        peak_rss_mb: Peak memory, where it was not this process that worked.
    """

    mean: Float[Tensor, " m"]
    variance: Float[Tensor, " m"] | None
    learnt: Learnt
    steps: int
    reason: str
    seconds: Mapping[str, float]
    cpu_seconds: Mapping[str, float]
    settings: Mapping[str, Any]
    rows: int
    history: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = field(default=())
    peak_rss_mb: float | None = None


def thin(history: Sequence[Any], limit: int = _HISTORY) -> list[Any]:
    """At most ``limit`` entries, evenly spread, the first and the last among them."""
    if len(history) <= limit:
        return list(history)
    last = len(history) - 1
    return [history[round(i * last / (limit - 1))] for i in range(limit)]
