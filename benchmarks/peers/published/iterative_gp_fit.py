"""github.com/jandylin/iterative-gaussian-processes: its ``mll_optimiser.fit``.

    python -m benchmarks.peers.published.iterative_gp_fit CHECKOUT DATA.npz ANSWER.npz

Pathwise gradients, warm starts and alternating projections, their fastest combination,
with blocks and tolerance as in its ``config.yaml``. One step that is made and forgotten
beforehand compiles everything, off the clock.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.published.iterative_gp import BLOCK, absent_modules
from benchmarks.peers.published.protocol import Question
from benchmarks.uci.memory import peak_rss_mb

TOLERANCE = 0.01
_FEATURES = 2000


@dataclass(frozen=True)
class FitData(Question):
    """What is learnt from, and how long.

    Attributes:
        x: Inputs (n, d).
        y: Targets (n,).
        x_test: Inputs to predict at (m, d).
        start: Noise and signal scale and all lengthscales before the first step.
        least_noise: Noise scale below which none is learnt.
        samples: Of the posterior, for gradients and variances.
        steps: Of Adam.
        learning_rate: Of Adam.
        max_epochs: Budget of a step's solve in passes over K.
        max_seconds: No step is begun after so long.
        seed: Of the features and the noise.
    """

    x: NDArray[Any]
    y: NDArray[Any]
    x_test: NDArray[Any]
    start: float
    least_noise: float
    samples: int
    steps: int
    learning_rate: float
    max_epochs: float
    max_seconds: float
    seed: int


class _Over(Exception):
    """Leaves the loop of the published code when the time is up."""


def _now() -> tuple[float, float]:
    """Seconds of the clock and of the CPU."""
    return time.perf_counter(), time.process_time()


def fitted(data: FitData) -> dict[str, Any]:
    """Learn, and predict by the solve of one more step.

    Returns:
        Scales; mean and variance of the noisy targets (m,); steps; peak memory; and
        seconds, of the clock and of the CPU, of the steps and of the predictions.
    """
    absent_modules()
    import jax
    import jax.numpy as jnp
    import kernels
    from gradient_estimators import pathwise_gradient
    from linear_solvers import ap_solver
    from mll_optimiser import fit
    from structs import Dataset

    x, y, x_test = (jnp.asarray(given) for given in (data.x, data.y, data.x_test))
    n, d = x.shape
    settings: dict[str, Any] = {
        "noise_scale_init": data.start,
        "signal_scale_init": data.start,
        "length_scale_init": data.start,
        "noise_scale_min": data.least_noise,
        "pretrained_init": False,
        "pathwise_init": False,
        "estimator_name": "pathwise",
        "solver_name": "ap",
        "warm_start": True,
        "n_features": _FEATURES,
        "n_samples": data.samples,
        "rtol_y": TOLERANCE,
        "rtol_z": TOLERANCE,
        "max_epochs": int(data.max_epochs),
        "batch_size": min(BLOCK, n // 2),
        "learning_rate": data.learning_rate,
        "checkpoint_interval": 0,
        "log_wandb": False,
        "log_verbose": False,
        "log_metrics_exact": False,
        "log_metrics_samples": False,
        "seed": data.seed,
    }
    clock: list[tuple[float, float]] = []
    solved: list[Any] = []

    def gradient(**given: Any) -> Any:
        if clock and time.perf_counter() - clock[0][0] >= data.max_seconds:
            raise _Over
        clock.append(_now())
        found = jax.block_until_ready(pathwise_gradient(**given))
        clock.append(_now())
        solved[:] = given["model_params"], found[0]
        return found

    for steps in (1, data.steps + 1):  # the first is to compile
        clock.clear()
        with suppress(_Over):
            fit(
                Dataset(x, y, n, d),
                None,
                kernels.matern32_kernel_fn,
                kernels.matern32_kernel_grad_fn,
                kernels.matern32_feature_params_fn,
                gradient,
                ap_solver,
                SimpleNamespace(**settings, n_iterations=steps),
            )
    parameters, state = solved
    of_kernel, weights = parameters.kernel_params, state.v0

    def predicted() -> tuple[Any, Any]:
        k = kernels.matern32_kernel_fn(x_test, x, of_kernel)
        prior = kernels.feature_vec_prod(
            x_test, of_kernel, state.feature_params, state.w, settings["batch_size"]
        )
        squares = ((prior - k @ weights[:, 1:]) ** 2).mean(1)
        mean, variance = k @ weights[:, 0], squares + parameters.noise_scale**2
        return np.asarray(mean), np.asarray(variance)

    predicted()  # to compile
    began = _now()
    mean, variance = predicted()
    ended = _now()
    return {
        "noise_scale": np.asarray(parameters.noise_scale),
        "signal_scale": np.asarray(of_kernel.signal_scale),
        "lengthscale": np.asarray(of_kernel.length_scale),
        "mean": mean,
        "variance": variance,
        "steps": len(clock) // 2 - 1,
        "peak_rss_mb": peak_rss_mb(),
        "seconds": [clock[-1][0] - clock[0][0], ended[0] - began[0]],
        "cpu_seconds": [clock[-1][1] - clock[0][1], ended[1] - began[1]],
    }


def main(arguments: Sequence[str]) -> None:
    """Answer."""
    checkout, question, file = arguments
    sys.path.insert(0, checkout)
    np.savez(file, **fitted(FitData.load(Path(question))))


if __name__ == "__main__":
    main(sys.argv[1:])
