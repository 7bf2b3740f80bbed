"""One run in this process.

``python -m benchmarks.thompson_sampling.run JSON FOLDER`` writes the result of the
request into the folder.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.thompson_sampling.methods import METHODS, Fitted
from benchmarks.thompson_sampling.problem import (
    Problem,
    make_problem,
    stream,
    uniform,
)
from benchmarks.thompson_sampling.request import Request
from benchmarks.thompson_sampling.store import Result, write_result
from benchmarks.uci.memory import peak_rss_mb
from sgdgp.bayesopt import maximise


def run(request: Request, *, tell: Callable[[str], None] = print) -> Result:
    """Every step of a run.

    Seconds are those of the method alone: prior draws, solve, maximisation; where they
    are far above the seconds of the processor, the machine was not quiet. "best" is
    the largest value of the objective, without noise, at all points known so far.

    Args:
        request: What to run.
        tell: Told of each step that is done.
    """
    problem = make_problem(request)
    x, y = problem.x, problem.y
    best = float(problem.values(x).max())
    history: list[dict[str, Any]] = []
    fit = METHODS[request.method]
    fitted: Fitted | None = None
    spent = 0.0
    for step in range(1, request.steps + 1):
        start, cpu = time.perf_counter(), time.process_time()
        fitted = fit(problem, x, y, step, fitted)
        fit_seconds = time.perf_counter() - start
        found, expected = _proposals(problem, fitted, x, y, step)
        seconds = time.perf_counter() - start
        spent += seconds
        cpu_seconds = time.process_time() - cpu
        values = problem.values(found)
        best = max(best, float(values.max()))
        history.append(
            {
                "step": step,
                "known": len(x),
                **fitted.account,
                "fit_seconds": fit_seconds,
                "maximise_seconds": seconds - fit_seconds,
                "cpu_seconds": cpu_seconds,
                "spent_seconds": spent,
                "expected": expected,
                "found": float(values.mean()),
                "best": best,
            }
        )
        tell(one_line(request, history[-1]))
        x = torch.cat([x, found])
        y = torch.cat([y, problem.observed(found, step)])
    return {
        "request": request.to_dict(),
        "start": float(problem.values(problem.x).max()),
        "best": best,
        "spent_seconds": spent,
        "peak_rss_mb": peak_rss_mb(),
        "threads": torch.get_num_threads(),
        "history": history,
    }


def _proposals(
    problem: Problem, fitted: Fitted, x: Tensor, y: Tensor, step: int
) -> tuple[Tensor, float | None]:
    """One point for each function, and their mean value in its eyes."""
    request = problem.request
    if fitted.functions is None:
        return uniform(request, "random search", step, request.batch), None
    maxima = maximise(
        fitted.functions,
        problem.bounds,
        request.num_candidates,
        nearby=0.5 * request.lengthscale,
        rounds=request.rounds,
        starts=request.starts,
        steps=request.ascent_steps,
        learning_rate=request.learning_rate,
        x=x,
        y=y,
        seed=stream(request, "candidates", step),
        progress=False,
    )
    return maxima.x.detach(), float(maxima.values.mean())


def one_line(request: Request, entry: dict[str, Any]) -> str:
    """What is told of a step."""
    text = (
        f"{request.label} {request.lengthscale:g} {request.seed} step {entry['step']}: "
        f"best {entry['best']:.3f}, found {entry['found']:.3f}"
    )
    if entry["expected"] is not None:
        text += f" (expected {entry['expected']:.3f})"
    if "passes" in entry:
        text += f", {entry['passes']:.1f} passes"
    if "residual_samples" in entry:
        text += f", residual {entry['residual_samples']:.3f}"
    seconds = f"{entry['solve']:.1f} + {entry['maximise_seconds']:.1f} s"
    return f"{text}, {seconds}"


def main(arguments: Sequence[str]) -> int:
    """Run what the arguments say."""
    text, folder = arguments
    torch.set_num_threads(1)
    request = Request(**json.loads(text))
    result = run(request, tell=lambda line: print(line, flush=True))
    write_result(Path(folder), request, result)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
