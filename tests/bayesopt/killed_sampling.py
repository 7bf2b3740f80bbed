"""Thompson sampling that is killed and called again; ``python -m`` for a report.

One process imports everything and forks a child for each call, which is killed at a
random time after a given call of the objective, or before or after it puts a file in
its place. Every evaluation of the objective is written into a log before it is done.
"""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

from sgdgp.bayesopt import Result, maximise, thompson_sampling
from sgdgp.bayesopt.record import KIND
from sgdgp.core.codec import read_values
from tests.models import GP

INITIAL, STEPS, BATCH, AT_ONCE = 8, 3, 6, 4
CALLS = 2 + 2 * STEPS
KILLS = 6
BOX = torch.tensor([[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])

MAXIMISER = functools.partial(maximise, num_candidates=32, rounds=2, steps=6)


class Objective:
    """A smooth function with one maximum; it writes down what it is asked.

    Args:
        log: Where to.
        call: The call during or after which the process is killed; 0 for none.
        delay: Seconds from the beginning of that call to the kill.
    """

    def __init__(self, log: Path, call: int = 0, delay: float = 0.0) -> None:
        self.log, self.call, self.delay = log, call, delay
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        with self.log.open("a") as file:
            file.writelines(json.dumps(point) + "\n" for point in x.tolist())
        self.calls += 1
        if self.calls == self.call:
            threading.Timer(self.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
        time.sleep(0.004)
        return torch.sin(3 * x).sum(1) - (x - 0.4).square().sum(1)


def sampled(place: Path, call: int = 0, delay: float = 0.0) -> Result:
    """The call that is killed."""
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    model = GP(x, x[:, 0], ScaleKernel(MaternKernel(nu=2.5)))
    model.likelihood.noise = 1e-3
    return thompson_sampling(
        Objective(place.with_suffix(".log"), call, delay),
        BOX,
        INITIAL,
        STEPS,
        BATCH,
        model=model,
        maximiser=MAXIMISER,
        redraw_every=2,
        num_features=64,
        evaluate_at_once=AT_ONCE,
        checkpoint=place,
        seed=5,
        progress=False,
    )


def run(
    place: Path,
    moment: tuple[int, float] = (0, 0.0),
    write: tuple[int, bool] | None = None,
) -> bool:
    """Call in a process of its own; whether it was killed."""
    child = os.fork()
    if child == 0:
        try:
            if write is not None:
                dies_at(*write)
            sampled(place, *moment)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the call failed; see its error above")
    return os.WIFSIGNALED(status)


def dies_at(number: int, moved: bool) -> None:
    """Make this process kill itself at a write, before or after the file is moved."""
    writes = 0
    replace = Path.replace

    def replaced(self: Path, target: Path) -> Path:
        nonlocal writes
        writes += 1
        if writes == number and not moved:
            os.kill(os.getpid(), signal.SIGKILL)
        found = replace(self, target)
        if writes == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    Path.replace = replaced  # type: ignore[method-assign]


def report(place: Path, kills: int) -> dict[str, object]:
    """The observations in the file, and how many evaluations there were."""
    record = read_values(place, KIND)["record"]
    return {
        "x": record.x.tolist(),
        "y": record.y.tolist(),
        "steps": [step.step for step in record.history],
        "evaluations": len(place.with_suffix(".log").read_text().splitlines()),
        "kills": kills,
    }


def main(folder: str) -> None:
    """Print reports of an undisturbed run and of killed ones."""
    torch.set_num_threads(1)
    place = Path(folder)
    # What a first call loads lazily is loaded before the forks.
    sampled(place / "warm")
    run(place / "undisturbed")
    reports = {"undisturbed": report(place / "undisturbed", 0)}
    draw = random.Random(0)
    for i in range(KILLS):
        name = f"moment {i}"
        moment = (1 + i * CALLS // KILLS, 0.06 * draw.random())
        kills = run(place / name, moment)
        run(place / name)
        reports[name] = report(place / name, int(kills))
    kills = sum(run(place / "again", (1, 0.03 * draw.random())) for _ in range(KILLS))
    run(place / "again")
    reports["again"] = report(place / "again", kills)
    number, killed = 1, True
    while killed:
        name = f"write {number}"
        # Before and after the move by turns.
        killed = run(place / name, write=(number, number % 2 == 0))
        run(place / name)
        reports[name] = report(place / name, int(killed))
        number += 1
    print(json.dumps(reports))


if __name__ == "__main__":
    main(sys.argv[1])
