"""When a fit has stopped gaining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sgdgp.core.checks import check_count, check_positive


@dataclass(frozen=True)
class Plateau:
    """Stop when the last steps together gained next to nothing.

    Attributes:
        patience: Number of steps looked at.
        gain: Least gain of log p(y | X) / n over them.
    """

    patience: int = 10
    gain: float = 1e-3

    def __post_init__(self) -> None:
        check_count("patience", self.patience, 1)
        check_positive("gain", self.gain)

    def is_reached(self, values: Sequence[float]) -> bool:
        """Whether a series of values has come to rest.

        Compared are the best value before and among the last ``patience``: a fit that
        oscillates around its optimum gains nothing.
        """
        if len(values) <= self.patience:
            return False
        earlier, recent = values[: -self.patience], values[-self.patience :]
        return max(recent) - max(earlier) < self.gain
