"""One run: a function, a seed, a model. ``python -m`` writes it as one JSON file."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from botorch.acquisition.logei import qLogExpectedImprovement
from botorch.exceptions.warnings import BotorchWarning
from botorch.optim import optimize_acqf
from botorch.utils.sampling import draw_sobol_samples
from torch import Tensor

from benchmarks.acquisitions.models import MODELS, fitted
from benchmarks.acquisitions.problems import DIM, Objective
from benchmarks.json_file import write_json

INITIAL = 14
BATCH = 4
STEPS = 9
RESTARTS = 8
CANDIDATES = 512
ITERATIONS = 200
"""50 evaluations in all: 14 Sobol points, then nine batches of four."""

_UNIT_CUBE = torch.stack([torch.zeros(DIM), torch.ones(DIM)]).double()


def optimised(name: str, seed: int, model: str, steps: int = STEPS) -> dict[str, Any]:
    """Maximise a function; the record of how it went.

    Both models of a function and seed begin with the same points, and in every step
    the optimiser of the acquisition begins with the same raw candidates.

    Args:
        name: Function.
        seed: Of everything random.
        model: Which posterior.
        steps: Batches.

    Raises:
        ValueError: There is no such function or model.
    """
    if model not in MODELS:
        raise ValueError(
            f"models: found {model!r}, expected some of {', '.join(MODELS)}"
        )
    objective = Objective(name)
    x = draw_sobol_samples(_UNIT_CUBE, n=INITIAL, q=1, seed=seed).squeeze(1)
    y = objective(x)
    best, fits, searches = [float(y.max())], 0.0, 0.0
    for step in range(steps):
        start = time.perf_counter()
        definition = fitted(x, y)
        fits += time.perf_counter() - start
        own_seed = 1000 * seed + step
        start = time.perf_counter()
        new = proposals(definition, model, float(y.max()), own_seed)
        searches += time.perf_counter() - start
        x, y = torch.cat([x, new]), torch.cat([y, objective(new)])
        best.append(float(y.max()))
    return {
        "function": name,
        "seed": seed,
        "model": model,
        "evaluations": len(y),
        "optimum": objective.optimum,
        "best": best,
        "seconds": {"fits": fits, "acquisition": searches},
        "torch": torch.__version__,
    }


def proposals(definition: Any, model: str, best: float, seed: int) -> Tensor:
    """A batch (4, 6) of large qLogEI, point by point.

    One by one is quicker than all together and found batches of larger values: of 20
    restarts over 24 variables one or two reach the best maximum, which hides what the
    posteriors do.

    Args:
        definition: Fitted model.
        model: Which posterior of it.
        best: Largest value so far.
        seed: Of samples and starting points.
    """
    posterior, sampler = MODELS[model](definition, seed)
    acquisition = qLogExpectedImprovement(posterior, best_f=best, sampler=sampler)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        found, _ = optimize_acqf(
            acquisition,
            bounds=_UNIT_CUBE,
            q=BATCH,
            num_restarts=RESTARTS,
            raw_samples=CANDIDATES,
            options={"maxiter": ITERATIONS, "seed": seed},
            sequential=True,
        )
    return found


def path_of(folder: Path, name: str, seed: int, model: str) -> Path:
    """Where a run is kept."""
    return folder / f"{name}-{seed}-{model}.json"


def main(arguments: Sequence[str]) -> None:
    """Run one and write it: function, seed, model, folder."""
    name, seed, model, folder = arguments
    torch.set_num_threads(1)
    # Fits of few points end early, and BoTorch says so each time.
    warnings.simplefilter("ignore", BotorchWarning)
    record = optimised(name, int(seed), model)
    write_json(path_of(Path(folder), name, int(seed), model), record)
    print(f"{name} {seed} {model}: {record['best'][-1]:.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
