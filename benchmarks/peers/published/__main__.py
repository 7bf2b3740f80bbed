"""Solve one system by published code: started by ``benchmarks.peers.solves``.

    python -m benchmarks.peers.published CODE SOLVER CHECKOUT SYSTEM.npz ANSWER.npz

The exit status is 2 where the code cannot be imported; its last line says why.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.published.protocol import Solver, System

_TRIES = 3
_LOOK = 1.05  # times the epochs at the last look
_LOST = 10.0  # relative residual of a solver that diverges


def answer(solver: Solver, system: System) -> dict[str, Any]:
    """Run to the true residual that is asked, looked at with the clock stopped.

    A solver that ends by its own residual a little early gets another try from the
    start with a tighter tolerance, of which the time alone counts.
    """
    tolerance = system.tolerance
    for _ in range(_TRIES):
        steps = solver(system, tolerance)
        next(steps)
        weights, epochs, reached = np.zeros_like(system.rhs), 0.0, 1.0
        seconds = cpu_seconds = next_look = 0.0
        over = False
        while not over:
            start, cpu_start = time.perf_counter(), time.process_time()
            found = next(steps, None)
            seconds += time.perf_counter() - start
            cpu_seconds += time.process_time() - cpu_start
            if found is None:
                break
            epochs = found[1]
            over = epochs >= system.max_epochs or seconds >= system.max_seconds
            if over or epochs >= next_look:
                weights, next_look = np.asarray(found[0]), _LOOK * epochs
                reached = system.residual(weights)
                over |= not system.tolerance < reached < _LOST
        else:
            break
        if reached <= system.tolerance:
            break
        tolerance *= 0.9 * system.tolerance / reached
    times = {"seconds": seconds, "cpu_seconds": cpu_seconds}
    return {"weights": weights, "epochs": epochs, **times}


def main(arguments: Sequence[str]) -> int:
    """Answer; 2 if something that has to be imported is missing."""
    code, name, checkout, question, file = arguments
    sys.path.insert(0, checkout)
    adapter = importlib.import_module(f"benchmarks.peers.published.{code}")
    try:
        found = answer(adapter.SOLVERS[name], System.load(Path(question)))
    except ImportError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    np.savez(file, **found)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
