"""Every figure that describes a prediction on the test rows."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp import metrics

NAMES = ("rmse", "nll", "coverage", "crps", "calibration_error")


def scores(
    mean: Float[Tensor, " m"], variance: Float[Tensor, " m"], y: Float[Tensor, " m"]
) -> dict[str, float | None]:
    """Scores of Gaussian predictions of y (m,), the noise in ``variance``.

    A figure that needs a prediction which is NaN, infinite, or has a variance that
    is not positive, is None: a broken solve is recorded, not hidden.
    """
    result: dict[str, float | None] = dict.fromkeys(NAMES)
    if not torch.isfinite(mean).all():
        return result
    result["rmse"] = metrics.rmse(mean, y)
    if not (torch.isfinite(variance).all() and (variance > 0).all()):
        return result
    result["nll"] = metrics.negative_log_predictive_density(mean, variance, y)
    result["coverage"] = metrics.interval_coverage(mean, variance, y)
    result["crps"] = metrics.crps(mean, variance, y)
    result["calibration_error"] = metrics.calibration_error(mean, variance, y)
    return result
