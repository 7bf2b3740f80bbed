"""One run in this process: ``python -m benchmarks.solvers.race REQUEST PROBLEM DIR``.

The command line starts every run in a fresh process, so that its memory, threads and
caches are its own. REQUEST is a ``RaceRequest`` as JSON, PROBLEM a file that
``Problem.save`` wrote, DIR the folder of the results.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import sgdgp
from benchmarks.solvers.contenders import contender
from benchmarks.solvers.problem import Problem
from benchmarks.solvers.request import RaceRequest
from benchmarks.solvers.stopwatch import Stopwatch
from benchmarks.solvers.store import write_result
from benchmarks.solvers.task import Contender, Outcome, Task
from benchmarks.solvers.trace import Trace
from benchmarks.uci.memory import peak_rss_mb
from benchmarks.uci.run import versions
from sgdgp.core.memory import resolve_budget

_WARM_UP = 256
_TIGHTENINGS = 2
_SLACK = 1.01
"""A claim may be off by so much: float32 sums are not float64 sums."""


def race(request: RaceRequest, problem: Problem, folder: Path) -> dict[str, Any]:
    """Run the contender once and write what was measured.

    Args:
        request: The run.
        problem: The system it asks for.
        folder: Where the JSON file goes.

    Returns:
        The result.
    """
    if request.threads is not None:
        torch.set_num_threads(request.threads)
    solve = contender(request.solver)
    warm_up(solve, request, problem)
    before = peak_rss_mb()
    result = measured(solve, request, problem)
    result["peak_rss_mb"] = result.pop("peak_mb")
    result["rss_growth_mb"] = result["peak_rss_mb"] - before
    result |= {
        "problem": problem.name,
        "solver": request.solver,
        "tolerance": request.tolerance,
        "n": problem.n,
        "d": problem.x.shape[1],
        "columns": problem.rhs.shape[1],
        "noise": problem.noise,
        "facts": dict(problem.facts),
        "command": request.command,
        "versions": {**versions(), "sgdgp": sgdgp.__version__, "source": revision()},
        "machine": machine(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    write_result(folder, request, result)
    return result


def warm_up(solve: Contender, request: RaceRequest, problem: Problem) -> None:
    """Solve a few equations, so that nobody pays for first calls on the clock."""
    small = problem.head(_WARM_UP)
    # A contender that cannot do so few equations may still do many.
    with contextlib.suppress(RuntimeError, ValueError):
        solve(_task(replace(request, trace=False, max_passes=5.0), small, 0.5))


def measured(
    solve: Contender, request: RaceRequest, problem: Problem
) -> dict[str, Any]:
    """Run on the clock; a peer that claims too early is run again, tighter.

    A tolerance on the recursive residual can be met while the true residual is a
    little above. The library's solvers check that on the clock. A peer that does not
    gets another try from the start, of which the time alone counts.
    """
    tolerance = request.tolerance
    for attempt in range(_TIGHTENINGS + 1):
        task = _task(request, problem, tolerance)
        outcome = solve(task)
        seconds, cpu_seconds = task.clock.seconds, task.clock.cpu_seconds
        peak = peak_rss_mb()  # before the check, which is not part of the solve
        residuals = problem.true_residuals(outcome.weights)
        mean = float(residuals.mean())
        may_try_again = (
            outcome.claimed is None
            and outcome.reason == "converged"
            and request.tolerance < mean < 2.0 * request.tolerance
            and attempt < _TIGHTENINGS
        )
        if not may_try_again:
            break
        tolerance *= 0.9 * request.tolerance / mean
    if task.trace is not None:
        with task.clock.paused():
            task.trace.note(outcome.passes, outcome.weights)
    return {
        "passes": outcome.passes,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mb": peak,
        "reason": outcome.reason,
        "true": {"mean": mean, "worst": float(residuals.max())},
        "claimed": claimed(outcome),
        **judged(request.tolerance, outcome, mean, float(residuals.max())),
        "asked_tolerance": tolerance,
        "solver_used": outcome.solver,
        "operator": outcome.operator,
        "settings": dict(outcome.settings),
        "warnings": list(outcome.warnings),
        "curve": task.trace.to_list() if task.trace else [],
    }


def claimed(outcome: Outcome) -> dict[str, float] | None:
    """What the contender says of its residuals."""
    if outcome.claimed is None:
        return None
    return {
        "mean": float(outcome.claimed.mean()),
        "worst": float(outcome.claimed.max()),
    }


def judged(
    tolerance: float, outcome: Outcome, mean: float, worst: float
) -> dict[str, bool]:
    """Whether it arrived, and whether it told the truth about it.

    The library's solvers promise a tolerance of every column, the peers of the mean.
    """
    promised = mean if outcome.claimed is None else worst
    finite = bool(torch.isfinite(outcome.weights).all())
    return {
        "reached": mean <= tolerance,
        "finite": finite,
        "worse_than_start": not worst <= 1.0 + 1e-6,
        "honest": outcome.reason != "converged" or promised <= _SLACK * tolerance,
    }


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    load = os.getloadavg() if hasattr(os, "getloadavg") else (math.nan,) * 3
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": load[0],
    }


def revision() -> str | None:
    """Commit of the source tree, marked "-dirty" if it was changed since."""
    folder = Path(__file__).resolve().parents[2]
    with contextlib.suppress(OSError):
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.strip() or None
    return None


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _task(request: RaceRequest, problem: Problem, tolerance: float) -> Task:
    clock = Stopwatch()
    return Task(
        problem,
        tolerance,
        request.max_passes,
        request.max_seconds,
        resolve_budget(request.memory_budget),
        request.problem.seed,
        clock,
        Trace(problem, clock) if request.trace else None,
    )


def main(arguments: list[str]) -> int:
    """Run one request; what went wrong is said in one line."""
    request = RaceRequest.from_dict(json.loads(arguments[0]))
    # If memory runs out, this process goes first and the rest of the machine stays.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    try:
        race(request, Problem.load(Path(arguments[1])), Path(arguments[2]))
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as error:
        print(f"error: {request.stem}: {error}", file=sys.stderr)
        if os.environ.get("SGDGP_DEBUG"):
            raise
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
