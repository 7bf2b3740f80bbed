"""One run in this process: ``python -m benchmarks.uci.run REQUEST RESULTS``.

The command line of the benchmark starts every run in a fresh process, so that its
peak memory, threads and caches are its own. REQUEST is a ``RunRequest`` as JSON.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import sgdgp
from benchmarks.uci.curve import Trace, curve, residuals
from benchmarks.uci.data import Split, load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.hyperparameters import Hyperparameters, hyperparameters_for
from benchmarks.uci.memory import peak_rss_mb
from benchmarks.uci.model import build_model
from benchmarks.uci.request import RunRequest, exact_request
from benchmarks.uci.scores import scores
from benchmarks.uci.solvers import SOLVERS
from benchmarks.uci.store import read_result, write_result

_PACKAGES = ("sgdgp", "torch", "gpytorch", "linear_operator", "numpy", "pykeops")


def run(request: RunRequest, folder: Path) -> dict[str, Any]:
    """Do what is asked and write the result into ``folder``.

    Args:
        request: The run; solver ``"exact"`` computes the reference.
        folder: Of the results; an exact reference of the same model is looked for
            there, and a JSON file for this run is written.

    Returns:
        The result as it was written.

    Raises:
        ValueError: The data set, split, solver or hyperparameters do not exist.
    """
    split = load_split(
        request.dataset, request.split, dtype=getattr(torch, request.dtype)
    )
    values = hyperparameters_for(
        request.hyperparameters,
        request.dataset,
        request.split,
        split.x.shape[1],
        noise_scale=request.noise_scale,
    )
    work = _exact if request.solver == "exact" else _solve
    result = {
        **_identity(request, split, values),
        **work(request, folder, split, values),
    }
    write_result(folder, request, result)
    return result


def _identity(
    request: RunRequest, split: Split, values: Hyperparameters
) -> dict[str, Any]:
    return {
        "dataset": request.dataset,
        "split": request.split,
        "solver": request.solver,
        "n": split.x.shape[0],
        "d": split.x.shape[1],
        "num_test": len(split.y_test),
        "seed": request.seed,
        "dtype": request.dtype,
        "num_samples": request.num_samples,
        "noise_scale": values.noise_scale,
        "request": request.to_dict(),
        "command": request.command,
        "versions": versions(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _solve(
    request: RunRequest, folder: Path, split: Split, values: Hyperparameters
) -> dict[str, Any]:
    if request.solver not in SOLVERS:
        raise ValueError(
            f"solver: found {request.solver!r}, expected one of {', '.join(SOLVERS)}"
        )
    solver = SOLVERS[request.solver](request.max_passes)
    trace = Trace(request.max_passes if request.solver == "auto" else None)
    posterior = sgdgp.condition(
        build_model(split.x, split.y, values),
        split.x,
        split.y,
        solver=solver,
        num_samples=request.num_samples,
        seed=request.seed,
        memory_budget=request.memory_budget,
        callback=trace,
        progress=False,
    )
    if posterior.solution.reason == "interrupted" and not trace.stopped:
        raise KeyboardInterrupt  # half a solve is no result
    start = time.perf_counter()
    prediction = posterior.predict(split.x_test, observation_noise=True)
    seconds = time.perf_counter() - start
    # Read before the curve is computed: that is not part of what is measured.
    memory = peak_rss_mb()
    solution = posterior.solution
    mean, variance = prediction.mean.detach(), prediction.variance.detach()
    figures = scores(mean, variance, split.y_test)
    warnings = list(solution.warnings)
    if None in figures.values():
        warnings.append("the predictions are not finite with a positive variance")
    if trace.stopped:
        warnings.append(f"stopped by --max-passes {request.max_passes}")
    return {
        **figures,
        **residuals(solution.residuals),
        "operator": solution.operator,
        "solver_used": solution.solver,
        "passes": solution.passes,
        "seconds": {
            "prior_draws": posterior.timings["prior_draws"],
            "solve": posterior.timings["solve"],
            "prediction": seconds,
        },
        "peak_rss_mb": memory,
        "reason": solution.reason,
        "warnings": warnings,
        "settings": solution.settings,
        "exact": _against_exact(request, folder, mean, variance),
        "curve": curve(trace, solution, split, values),
    }


def _exact(
    request: RunRequest, folder: Path, split: Split, values: Hyperparameters
) -> dict[str, Any]:
    start = time.perf_counter()
    mean, variance = exact_prediction(split, values)
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    path = _prediction_path(folder, request)
    np.savez_compressed(path, mean=mean.numpy(), variance=variance.numpy())
    return {
        **scores(mean, variance, split.y_test),
        "seconds": {"prior_draws": 0.0, "solve": seconds, "prediction": 0.0},
        "peak_rss_mb": peak_rss_mb(),
        "reason": "exact",
    }


def _prediction_path(folder: Path, request: RunRequest) -> Path:
    return folder / f"{request.stem}.npz"


def _against_exact(
    request: RunRequest, folder: Path, mean: Tensor, variance: Tensor
) -> dict[str, float] | None:
    """Distance of the predictions to the exact ones, if those are in ``folder``."""
    reference = exact_request(request)
    path = _prediction_path(folder, reference)
    stored = read_result(folder, reference)
    if stored is None or not path.exists():
        return None
    with np.load(path) as arrays:
        exact_mean, exact_variance = (
            torch.from_numpy(arrays[name]) for name in ("mean", "variance")
        )
    ratio = variance.double() / exact_variance
    return {
        "rmse": stored["rmse"],
        "nll": stored["nll"],
        "mean_rms_difference": float(
            (mean.double() - exact_mean).square().mean().sqrt()
        ),
        "variance_ratio_mean": float(ratio.mean()),
    }


def versions() -> dict[str, str | int]:
    """What the figures were made with."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count() or 0,
    }
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main(arguments: list[str]) -> int:
    """Run one request; what went wrong is said in one line."""
    request = RunRequest(**json.loads(arguments[0]))
    try:
        run(request, Path(arguments[1]))
    except (ValueError, TypeError, OSError, MemoryError) as error:
        print(f"error: {request.stem}: {error}", file=sys.stderr)
        if os.environ.get("SGDGP_DEBUG"):
            raise
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
