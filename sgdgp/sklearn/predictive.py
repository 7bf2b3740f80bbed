"""Moments and samples of a posterior as NumPy arrays with an axis for outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

_ROWS = 4096
"""Points at a time."""


def posterior_mean(posterior: Any, x: Tensor) -> np.ndarray:
    """Posterior mean (n', T)."""
    return _with_outputs(_by_batch(posterior.mean, x), axes=1)


def marginals(posterior: Any, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Posterior mean and variance (n', T), in one pass over the kernel."""
    mean, variance = posterior.predict(x, batch_size=_ROWS)
    return _with_outputs(mean, axes=1), _with_outputs(variance, axes=1)


def covariances(posterior: Any, x: Tensor, mean: np.ndarray) -> np.ndarray:
    """Covariance of the posterior samples (n', n', T), of rank ``num_samples``.

    Args:
        posterior: The posterior.
        x: Inputs (n', d).
        mean: Its mean there (n', T).
    """
    samples = function_values(posterior.samples, x)
    deviations = (samples - mean[..., None]).transpose(1, 0, 2)
    covariance = deviations @ deviations.transpose(0, 2, 1) / samples.shape[-1]
    return covariance.transpose(1, 2, 0)


def function_values(functions: Callable[[Tensor], Tensor], x: Tensor) -> np.ndarray:
    """Values of s functions (n', T, s)."""
    values = _by_batch(lambda rows: functions(rows).movedim(0, -1), x)
    return _with_outputs(values, axes=2)


def _by_batch(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([function(rows) for rows in x.split(_ROWS)])


def _with_outputs(values: Tensor, axes: int) -> np.ndarray:
    """An axis for the only output, behind that of the points, if there is none."""
    array = values.double().cpu().numpy()
    return array if array.ndim > axes else np.expand_dims(array, 1)
