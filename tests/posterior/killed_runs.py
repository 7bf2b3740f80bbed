"""Runs that are killed and called again; ``python -m`` this for a report in JSON.

One process imports everything and forks a child for each call of ``condition``, so a
kill costs no import. Children are killed from outside, by SIGKILL, at a random time
after a given number of callbacks, or inside a write, at a given step of it.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

import sgdgp
from sgdgp.core import files
from sgdgp.core.codec import read_values
from sgdgp.posterior import PathwisePosterior
from sgdgp.posterior.checkpoint import KIND
from sgdgp.solvers.base import Progress
from tests.models import GP

SAMPLES, TOLERANCE = 4, 1e-2
SOLVERS = {
    "sdd": sgdgp.SDD(tolerance=TOLERANCE),
    "cg": sgdgp.CG(tolerance=TOLERANCE, preconditioner=None),
}
STEPS = ("half of the temporary file", "before the move", "after the move")
"""Where a write may be cut off."""

KILLS = 10
EVERY = 0.02
NEVER = 10**9


def model(n: int) -> GP:
    """Points in three dimensions and noisy targets."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=generator)
    noise = torch.randn(n, generator=generator)
    kernel = ScaleKernel(MaternKernel(nu=1.5))
    found = GP(x, torch.sin(3 * x[:, 0]) + 0.3 * noise, kernel)
    kernel.base_kernel.lengthscale, kernel.outputscale = 0.7, 1.0
    found.likelihood.noise = 0.1
    return found


def conditioned(
    solver: str,
    n: int,
    path: Path | None,
    callback: Callable[[Progress], bool | None] | None = None,
) -> PathwisePosterior:
    """The call that is killed."""
    return sgdgp.condition(
        model(n),
        solver=SOLVERS[solver],
        num_samples=SAMPLES,
        num_features=512,
        seed=3,
        checkpoint=path,
        checkpoint_every=EVERY,
        callback=callback,
    )


def run(
    solver: str, n: int, path: Path, ticks: int, delay: float = 0.0
) -> tuple[bool, float]:
    """Call, kill ``delay`` seconds after so many callbacks; (was killed, passes)."""
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(out)

        def tick(progress: Progress) -> None:
            os.write(into, f"{progress.passes}\n".encode())
            time.sleep(0.002)

        try:
            os.write(into, b"0\n")
            conditioned(solver, n, path, tick)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(into)
    passes = 0.0
    with os.fdopen(out) as lines:
        for count, line in enumerate(lines):
            passes = max(passes, float(line))
            if count == ticks:
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the call failed; see its error above")
    return os.WIFSIGNALED(status), passes


def stored_passes(path: Path) -> float:
    """Passes in the file; zero without one. A file that is there must be valid."""
    if not path.exists():
        return 0.0
    passes: float = read_values(path, KIND)["solution"].passes
    return passes


def kill_until_done(
    solver: str, n: int, path: Path, moments: list[tuple[int, float]]
) -> dict[str, object]:
    """Kill a call at each of the moments, one after another, then let it end."""
    performed, stored, kills = 0.0, [0.0], 0
    for ticks, delay in [*moments, (NEVER, 0.0)]:
        killed, passes = run(solver, n, path, ticks, delay)
        kills += killed
        performed += max(0.0, passes - stored[-1])
        stored.append(stored_passes(path))
    return {"kills": kills, "performed": performed, "stored": stored}


def dies_at(step: str) -> None:
    """Make this process kill itself at a step of its third write."""
    writes = 0
    save, replace = files.save_file, Path.replace

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def saved(tensors: dict, filename: Path, metadata: dict) -> None:
        nonlocal writes
        writes += 1
        save(tensors, filename, metadata)
        if writes == 3 and step == "half of the temporary file":
            os.truncate(filename, filename.stat().st_size // 2)
            die()

    def replaced(self: Path, target: Path) -> Path:
        if writes == 3 and step == "before the move":
            die()
        moved = replace(self, target)
        if writes == 3 and step == "after the move":
            die()
        return moved

    files.save_file = saved
    Path.replace = replaced  # type: ignore[method-assign, assignment]


def killed_while_writing(
    solver: str, n: int, path: Path, step: str
) -> dict[str, object]:
    """Kill a call inside its third write, then let it end."""
    child = os.fork()
    if child == 0:
        try:
            dies_at(step)
            conditioned(solver, n, path, lambda progress: time.sleep(0.01))
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    left = sorted(p.name for p in path.parent.rglob("*") if p.is_file())
    stored = stored_passes(path)
    run(solver, n, path, NEVER)
    return {
        "killed": os.WIFSIGNALED(status),
        "left": left,
        "stored": [stored, stored_passes(path)],
        "at the end": sorted(p.name for p in path.parent.iterdir()),
    }


def one_kind(
    kind: str, solver: str, n: int, place: Path, undisturbed: float
) -> dict[str, object]:
    """The report of one kind of killing."""
    draw = random.Random(solver)
    report: dict[str, object] = {}
    if kind == "moments":
        # From before the first write to the last pass, one in each part of the run.
        for i in range(KILLS):
            part = (i + draw.random()) / KILLS
            moment = (round(part * (undisturbed - 2)), 0.02 * draw.random())
            report[str(i)] = kill_until_done(solver, n, place / str(i), [moment])
    elif kind == "again":
        moments = [
            (draw.randint(0, int(2 * undisturbed / KILLS)), 0.02 * draw.random())
            for _ in range(KILLS)
        ]
        report["again"] = kill_until_done(solver, n, place / "again", moments)
    else:
        for step in STEPS:
            (place / step).mkdir()
            report[step] = killed_while_writing(solver, n, place / step / "run", step)
    return report


def main(n: int, folder: str, *tasks: str) -> None:
    """Print the report of some tasks "solver:kind"; files go to folder/solver."""
    torch.set_num_threads(1)
    # What a first call loads lazily is loaded before the forks.
    conditioned("cg", 50, None)
    reports: dict[str, dict[str, object]] = {}
    for task in tasks:
        solver, kind = task.split(":")
        place = Path(folder) / solver
        if solver not in reports:
            place.mkdir()
            run(solver, n, place / "undisturbed", NEVER)
            passes = stored_passes(place / "undisturbed")
            reports[solver] = {"undisturbed": passes}
        reports[solver] |= one_kind(kind, solver, n, place, passes)
    print(json.dumps(reports))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
