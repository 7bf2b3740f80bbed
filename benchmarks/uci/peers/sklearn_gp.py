"""scikit-learn's exact regressor on a random subset of the training rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.peers.outcome import Clock, PeerOutcome, thin
from benchmarks.uci.request import RunRequest
from benchmarks.uci.trainable import Learnt

_Vector = NDArray[np.float64]


class _TimeIsUpError(Exception):
    """Leaves SciPy's optimiser."""


class _Optimiser:
    """scikit-learn's own optimiser, with a limit: the best point is kept."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.history: list[dict[str, float]] = []
        self.reason = "converged"

    def __call__(
        self, objective: Callable[..., Any], start: _Vector, bounds: _Vector
    ) -> tuple[_Vector, float]:
        from scipy.optimize import minimize  # comes with scikit-learn

        best: tuple[_Vector, float] = (start, math.inf)

        def evaluate(theta: _Vector) -> tuple[float, _Vector]:
            nonlocal best
            if self._clock.expired:
                raise _TimeIsUpError
            value, gradient = objective(theta, eval_gradient=True)
            if value < best[1]:
                best = (theta.copy(), float(value))
            self.history.append(
                {
                    "step": len(self.history) + 1,
                    "seconds": self._clock.elapsed,
                    "loss": float(value),
                }
            )
            return value, gradient

        try:
            found = minimize(
                evaluate, start, method="L-BFGS-B", jac=True, bounds=bounds
            )
        except _TimeIsUpError:
            self.reason = f"stopped at step {len(self.history)}"
        else:
            self.reason = "converged" if found.success else str(found.message)
        return best


def sklearn_subset(request: RunRequest, split: Split) -> PeerOutcome:
    """Train by L-BFGS and predict, in float64."""
    # An extra: only this peer needs it.
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    n, d = split.x.shape
    count = min(request.setting("sklearn_rows"), n)
    generator = torch.Generator().manual_seed(request.seed)
    rows = torch.randperm(n, generator=generator)[:count]
    x, y = (part[rows].double().numpy() for part in (split.x, split.y))
    kernel = ConstantKernel() * Matern(np.ones(d), nu=1.5) + WhiteKernel()
    clock = Clock(request.max_seconds)
    optimiser = _Optimiser(clock)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        with clock.phase("fit"):
            model = GaussianProcessRegressor(kernel, optimizer=optimiser).fit(x, y)
        with clock.phase("prediction"):
            mean, deviation = model.predict(
                split.x_test.double().numpy(), return_std=True
            )
    fitted = model.kernel_
    scaled, white = fitted.k1, fitted.k2
    return PeerOutcome(
        mean=torch.from_numpy(mean),
        variance=torch.from_numpy(deviation).square(),
        learnt=Learnt(
            0.0,
            Hyperparameters(
                math.sqrt(white.noise_level),
                math.sqrt(scaled.k1.constant_value),
                tuple(float(v) for v in np.broadcast_to(scaled.k2.length_scale, d)),
            ),
        ),
        steps=len(optimiser.history),
        reason=optimiser.reason,
        seconds=clock.seconds,
        cpu_seconds=clock.cpu_seconds,
        settings={
            "rows": count,
            "dtype": "float64",
            "optimiser": "L-BFGS-B, no restarts",
            "start": "all 1",
        },
        rows=count,
        history=thin(optimiser.history),
        warnings=list(dict.fromkeys(str(found.message) for found in caught))[:8],
    )
