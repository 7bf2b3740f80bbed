"""What an adapter is given and what it says: arrays of NumPy and nothing else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

_ROOT = Path(__file__).resolve().parents[3]


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

    def put_to(
        self, python: str, *arguments: str, threads: int
    ) -> tuple[subprocess.CompletedProcess[str], dict[str, NDArray[Any]]]:
        """Run ``python -m *arguments QUESTION ANSWER`` on the CPU.

        Args:
            python: An interpreter with what a published code imports.
            arguments: A module of this package, and what it is told.
            threads: Those it may take.

        Returns:
            How the process ended, and its answer.
        """
        environment = {
            **os.environ,
            "PYTHONPATH": str(_ROOT),
            "PYKEOPS_VERBOSE": "0",
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_cpu_multi_thread_eigen={str(threads > 1).lower()}",
            **dict.fromkeys(
                ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NPROC"), str(threads)
            ),
        }
        with tempfile.TemporaryDirectory() as folder:
            question, answer = (
                Path(folder) / "question.npz",
                Path(folder) / "answer.npz",
            )
            self.save(question)
            finished = subprocess.run(
                [python, "-m", *arguments, str(question), str(answer)],
                cwd=folder,
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            if finished.returncode:
                return finished, {}
            with np.load(answer) as found:
                return finished, dict(found)


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
