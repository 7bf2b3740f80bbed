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

from benchmarks.uci.against import Reference, against_exact
from benchmarks.uci.data import Split, load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.fit import fit_result
from benchmarks.uci.hyperparameters import Hyperparameters, hyperparameters_for
from benchmarks.uci.memory import LEFT_OUT, DoesNotFitError, peak_mb
from benchmarks.uci.model import build_model
from benchmarks.uci.peer_run import peer_result
from benchmarks.uci.request import FIT, RunRequest, exact_request
from benchmarks.uci.scores import scores
from benchmarks.uci.solve import solve
from benchmarks.uci.store import read_result, write_result
from benchmarks.uci.trainable import Learnt

_PACKAGES = (
    "sgdgp",
    "torch",
    "gpytorch",
    "linear_operator",
    "numpy",
    "pykeops",
    "scikit-learn",
)
_ARRAYS = ("mean", "variance")


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
        request.dataset,
        request.split,
        dtype=getattr(torch, request.dtype),
        device=request.device,
    )
    if request.is_peer:
        work = peer_result
    elif request.hyperparameters == FIT:
        work = fit_result
    else:
        work = _exact if request.solver == "exact" else _solve
    result = {**_identity(request, split), **work(request, folder, split)}
    write_result(folder, request, result)
    return result


def _identity(request: RunRequest, split: Split) -> dict[str, Any]:
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
        "request": request.to_dict(),
        "command": request.command,
        "versions": versions(split.x.device),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _values(request: RunRequest, split: Split) -> Hyperparameters:
    return hyperparameters_for(
        request.hyperparameters,
        request.dataset,
        request.split,
        split.x.shape[1],
        noise_scale=request.noise_scale,
    )


def _solve(request: RunRequest, folder: Path, split: Split) -> dict[str, Any]:
    values = _values(request, split)
    model = build_model(split.x, split.y, values)
    mean, variance, figures = solve(request, split, model, Learnt(0.0, values))
    reference = _stored_reference(request, folder)
    return {
        "noise_scale": values.noise_scale,
        **figures,
        "exact": reference and against_exact(reference, mean, variance),
    }


def _exact(request: RunRequest, folder: Path, split: Split) -> dict[str, Any]:
    values = _values(request, split)
    start = time.perf_counter()
    prediction = exact_prediction(split, values)
    seconds = time.perf_counter() - start
    folder.mkdir(parents=True, exist_ok=True)
    path = _prediction_path(folder, request)
    mean, variance = prediction.mean.cpu(), prediction.variance.cpu()
    np.savez_compressed(path, mean=mean.numpy(), variance=variance.numpy())
    return {
        "noise_scale": values.noise_scale,
        **scores(mean, variance, split.y_test.cpu()),
        "log_likelihood": prediction.log_likelihood,
        "seconds": {"prior_draws": 0.0, "solve": seconds, "prediction": 0.0},
        "peak_rss_mb": peak_mb(split.x.device),
        "reason": "exact",
    }


def _prediction_path(folder: Path, request: RunRequest) -> Path:
    return folder / f"{request.stem}.npz"


def _stored_reference(request: RunRequest, folder: Path) -> Reference | None:
    """The exact figures of the same hyperparameters, if they are in ``folder``."""
    reference = exact_request(request)
    path = _prediction_path(folder, reference)
    stored = read_result(folder, reference)
    if stored is None or not path.exists():
        return None
    with np.load(path) as arrays:
        mean, variance = (torch.from_numpy(arrays[name]) for name in _ARRAYS)
    return Reference(mean, variance, stored["rmse"], stored["nll"])


def versions(device: torch.device | None = None) -> dict[str, str | int]:
    """What the figures were made with."""
    found: dict[str, str | int] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpus": os.cpu_count() or 0,
    }
    if device is not None and device.type == "cuda":
        found["device"] = torch.cuda.get_device_name(device)
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
    except DoesNotFitError as error:
        print(f"left out: {request.stem}: {error}", file=sys.stderr)
        return LEFT_OUT
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
