"""The whole reproduction from raw data: initialise, fit, condition, predict, score."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.uci.against import exact_at
from benchmarks.uci.data import Split
from benchmarks.uci.peers.outcome import Clock, thin
from benchmarks.uci.request import RunRequest
from benchmarks.uci.solve import solve
from benchmarks.uci.solvers import SOLVERS
from benchmarks.uci.trainable import default_model, learnt


def fit_result(request: RunRequest, folder: Path, split: Split) -> dict[str, Any]:
    """Learn the hyperparameters on the training rows and score the test rows.

    Args:
        request: What to do; ``hyperparameters`` is ``"fit"``.
        folder: Of the results; not used.
        split: The data.
    """
    if request.solver not in SOLVERS:
        raise ValueError(
            f"solver: found {request.solver!r} with hyperparameters 'fit', expected "
            f"one of {', '.join(SOLVERS)}"
        )
    # Here, so that runs with given hyperparameters do not need it.
    from sgdgp.training import fit, initialise

    model = default_model(split.x, split.y)
    clock = Clock()
    with clock.phase("initialise"):
        if request.initialise is not None:
            initialise(model, split.x, split.y, seed=request.seed)
    with clock.phase("fit"):
        fitted = fit(
            model,
            split.x,
            split.y,
            steps=request.setting("fit_steps"),
            optimizer=partial(
                _adam, learning_rate=request.setting("fit_learning_rate")
            ),
            solver=request.solver,
            passes_per_step=request.setting("fit_passes_per_step"),
            max_seconds=_remaining(request.max_seconds, clock),
            seed=request.seed,
            memory_budget=request.memory_budget,
            progress=False,
        )
    if fitted.reason == "interrupted":
        raise KeyboardInterrupt  # half a fit is no result
    model.eval()
    parameters = learnt(model.mean_module, model.covar_module, model.likelihood)
    mean, variance, figures = solve(request, split, model, parameters)
    cpu = sum(clock.cpu_seconds.values()) + figures["cpu_seconds"]
    return {
        "noise_scale": parameters.values.noise_scale,
        **figures,
        "seconds": {**clock.seconds, **figures["seconds"]},
        "cpu_seconds": cpu,
        "fit": {
            "steps": fitted.steps,
            "passes": fitted.passes,
            "reason": fitted.reason,
            "parameters": parameters.to_dict(),
            "start": request.initialise or "default",
            "history": [asdict(found) for found in thin(fitted.history)],
            "warnings": list(fitted.warnings),
        },
        "exact": exact_at(request, parameters, mean, variance),
    }


def _remaining(max_seconds: float | None, clock: Clock) -> float | None:
    """What the start has left of the limit; enough for a step in any case."""
    if max_seconds is None:
        return None
    return max(max_seconds - clock.seconds["initialise"], 1e-3)


def _adam(parameters: Iterable[Any], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=learning_rate)
