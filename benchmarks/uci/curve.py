"""How a solve advanced: residuals from the callback, test RMSE off the clock.

While the solver runs only the weights of the mean are copied; their predictions are
computed afterwards, all of them in one product with K(X*, X).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.model import build_model, kernel_block
from sgdgp.solvers.base import Progress, Solution

_ENTRIES_PER_BLOCK = 1 << 24


@dataclass(frozen=True)
class Snapshot:
    """One moment of a solve."""

    passes: float
    seconds: float
    residuals: Tensor
    exact: bool
    weights: Float[Tensor, " n"] = field(repr=False)


class Trace:
    """A solver callback that keeps at most ``limit`` snapshots, evenly spread.

    Args:
        max_passes: Ask the solver to stop from there on. Default: never.
        limit: Snapshots kept, each n numbers. When full, every second one is
            dropped and only every second of the following ones is taken.
    """

    def __init__(self, max_passes: float | None = None, limit: int = 64) -> None:
        self._max_passes = max_passes
        self._limit = limit
        self._stride = 1
        self._calls = 0
        self.snapshots: list[Snapshot] = []
        self.stopped = False

    def __call__(self, progress: Progress) -> bool:
        """Take a snapshot if it is due; True once the budget is used up."""
        if self._calls % self._stride == 0:
            self._take(progress)
        self._calls += 1
        if self._max_passes is not None and progress.passes >= self._max_passes:
            self.stopped = True
        return self.stopped

    def _take(self, progress: Progress) -> None:
        if len(self.snapshots) == self._limit:
            self.snapshots = self.snapshots[::2]
            self._stride *= 2
            if self._calls % self._stride:
                return
        mean_weights = progress.weights()[:, 0].detach().clone()
        self.snapshots.append(
            Snapshot(
                progress.passes,
                progress.seconds,
                progress.residuals.detach().clone(),
                progress.exact,
                mean_weights,
            )
        )


def curve(
    trace: Trace, solution: Solution, split: Split, values: Hyperparameters
) -> list[dict[str, Any]]:
    """Residual and test RMSE of every snapshot and of the solution, in order.

    The predictions are computed in float64, whatever the solver ran in.
    """
    final = Snapshot(
        solution.passes,
        solution.seconds,
        solution.residuals,
        True,
        solution.weights[:, 0],
    )
    snapshots = [*trace.snapshots, final]
    weights = torch.stack([shot.weights.double() for shot in snapshots], dim=1)
    errors = _rmse_of_columns(weights, split, values)
    return [
        {
            "passes": shot.passes,
            "seconds": shot.seconds,
            **residuals(shot.residuals),
            "exact": shot.exact,
            "rmse": error,
        }
        for shot, error in zip(snapshots, errors, strict=True)
    ]


def residuals(columns: Float[Tensor, " k"]) -> dict[str, float]:
    """Relative residual of the mean's column, and the largest of the samples'."""
    samples = columns[1:] if len(columns) > 1 else columns
    return {
        "residual_mean": float(columns[0]),
        "residual_samples": float(samples.max()),
    }


def _rmse_of_columns(
    weights: Float[Tensor, "n k"], split: Split, values: Hyperparameters
) -> list[float]:
    x, x_test, y_test = split.x.double(), split.x_test.double(), split.y_test.double()
    model = build_model(x, split.y.double(), values)
    total = weights.new_zeros(weights.shape[1])
    rows = max(1, _ENTRIES_PER_BLOCK // len(x))
    for xs, ys in zip(x_test.split(rows), y_test.split(rows), strict=True):
        predicted = kernel_block(model, xs, x) @ weights
        total += (predicted - ys[:, None]).square().sum(dim=0)
    errors: list[float] = (total / len(y_test)).sqrt().tolist()
    return errors
