"""The published code iterative-gaussian-processes, in an interpreter of its own."""

from __future__ import annotations

import math
import os
import shlex
import sys
from pathlib import Path

import torch

from benchmarks.peers.published.iterative_gp import BLOCK
from benchmarks.peers.published.iterative_gp_fit import TOLERANCE, FitData
from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.peers.outcome import PeerOutcome
from benchmarks.uci.request import RunRequest
from benchmarks.uci.trainable import Learnt

PLACE = "SGDGP_ITERATIVE_GP"
"""In the environment: its checkout and a Python that has jax, apart by a space."""

_PHASES = ("fit", "prediction")


def place() -> tuple[str, str]:
    """The checkout and the interpreter.

    Raises:
        ValueError: There is none in the environment.
    """
    checkout, *python = shlex.split(os.environ.get(PLACE, "")) or [""]
    if not (Path(checkout) / "mll_optimiser.py").is_file() or len(python) > 1:
        raise ValueError(
            f'peers: iterative-gp needs {PLACE}="CHECKOUT [PYTHON]" in the '
            f"environment, found {os.environ.get(PLACE)!r}"
        )
    return checkout, python[0] if python else sys.executable


def iterative_gp(request: RunRequest, split: Split) -> PeerOutcome:
    """Train from GPyTorch's initial values, with a mean of zero, and predict.

    Raises:
        ValueError: There is no checkout.
        RuntimeError: It failed; with what it said.
    """
    checkout, python = place()
    data = FitData(
        split.x.numpy(),
        split.y.numpy(),
        split.x_test.numpy(),
        start=math.sqrt(math.log(2.0)),
        least_noise=1e-2,
        samples=request.num_samples,
        steps=request.setting("fit_steps"),
        learning_rate=request.setting("fit_learning_rate"),
        max_epochs=request.setting("fit_passes_per_step"),
        max_seconds=request.max_seconds or math.inf,
        seed=request.seed,
    )
    module = "benchmarks.peers.published.iterative_gp_fit"
    arguments = module, str(Path(checkout).resolve())
    threads = torch.get_num_threads()
    done, answer = data.put_to(python, *arguments, threads=threads)
    if done.returncode:
        raise RuntimeError(f"iterative-gp failed:\n{done.stderr}")
    found = {name: value.tolist() for name, value in answer.items()}
    steps = found["steps"]
    ended = "steps" if steps == data.steps else f"stopped at step {steps}"
    scales = found["noise_scale"], found["signal_scale"], tuple(found["lengthscale"])
    return PeerOutcome(
        mean=torch.tensor(found["mean"]),
        variance=torch.tensor(found["variance"]),
        learnt=Learnt(0.0, Hyperparameters(*scales)),
        steps=steps,
        reason=ended,
        seconds=dict(zip(_PHASES, found["seconds"], strict=True)),
        cpu_seconds=dict(zip(_PHASES, found["cpu_seconds"], strict=True)),
        settings={
            "estimator": "pathwise, warm start",
            "solver": f"alternating projections, blocks of {BLOCK}, "
            f"tolerance {TOLERANCE}",
            "passes_per_step": data.max_epochs,
            "samples": data.samples,
            "optimiser": f"Adam, learning rate {data.learning_rate}",
            "compiled": "before the clock",
            "dtype": "float32",
        },
        rows=len(split.x),
        peak_rss_mb=found["peak_rss_mb"],
    )
