"""What an adapter is given and what it says: arrays of NumPy and nothing else."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Question:
    """Arrays and numbers that go to another process in a file."""

    def save(self, path: Path) -> None:
        """Write it to an .npz file."""
        np.savez(path, **asdict(self))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote."""
        with np.load(path) as found:
            return cls(**{k: v if v.ndim else v.item() for k, v in found.items()})


@dataclass(frozen=True)
class System(Question):
    """(K + noise I) V = rhs, K the Matern-3/2 kernel of unit variance.

    Attributes:
        x: Inputs (n, d).
        rhs: B (n, k).
        lengthscale: One for every dimension.
        noise: Noise variance.
        tolerance: Relative residual, of the mean of the columns.
        max_epochs: Budget in passes over K.
        max_seconds: Budget in wall clock.
    """

    x: NDArray[np.float32]
    rhs: NDArray[np.float32]
    lengthscale: float
    noise: float
    tolerance: float
    max_epochs: float
    max_seconds: float

    def residual(self, weights: NDArray[Any]) -> float:
        """||b - (K + noise I) v|| / ||b||, the columns' mean, all of it in float64."""
        z = self.x.astype(float) / self.lengthscale
        v, rhs = np.asarray(weights, float), self.rhs.astype(float)
        left = rhs - self.noise * v
        norms = (z**2).sum(1)
        for rows in np.array_split(np.arange(len(z)), 1 + len(z) // 512):
            squares = norms[rows, None] + norms - 2.0 * z[rows] @ z.T
            s = np.sqrt(3.0 * np.maximum(squares, 0.0))
            left[rows] -= ((1.0 + s) * np.exp(-s)) @ v
        relative = np.linalg.norm(left, axis=0) / np.linalg.norm(rhs, axis=0)
        return float(relative.mean())


Solver = Callable[[System, float], Iterator[tuple[Any, float]]]
"""From a system and the tolerance it is to go by to weights (n, k) and epochs so far.

What it does before its first ``yield``, of which the value does not count, is
preparation off the clock: imports and compilation. The clock stands still at every
``yield``, and nobody need go on. A solver that knows no tolerance yields as it goes.
"""


def absent(name: str, **members: Any) -> None:
    """Let a module that a code imports, and these solvers never call, be missing."""
    parent, _, _ = name.rpartition(".")
    if name in sys.modules or (not parent and importlib.util.find_spec(name)):
        return
    module = ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
