"""The linearised network of sgdgp: as the evidence has it, and calibrated."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

import sgdgp.networks
from benchmarks.networks.data import Task
from benchmarks.networks.prediction import Fitted, Prediction, linearised
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.priors import GPrior, Isotropic, PriorSettings
from sgdgp.networks.weight_solvers import WeightCG

LEARNING_SAMPLES = 8
TOLERANCE = 0.2
STEPS = 6
PRIORS: dict[str, PriorSettings] = {"g": GPrior(), "isotropic": Isotropic()}
_BATCH = 200


def fit_ours(task: Task, network: nn.Module, *, num_samples: int, seed: int) -> Fitted:
    """All weights, curvature at the linear model, precision by the evidence.

    The calibrated variant scales all variances by one number, chosen by
    ``calibrate`` on the calibration images.
    """
    posterior = sgdgp.networks.linearise(
        network, sgdgp.networks.Categorical(), PRIORS[task.setting.prior]
    ).fit(
        task.train.loader(_BATCH),
        num_samples=LEARNING_SAMPLES,
        final_samples=num_samples,
        steps=STEPS,
        solver=WeightCG(tolerance=TOLERANCE),
        seed=seed,
        progress=False,
    )
    comparison = posterior.calibrate(task.calibration.loader(_BATCH))
    posterior.scale = 1.0
    return Fitted(
        ScaledPredictor(
            posterior, {"sgdgp, evidence": 1.0, "sgdgp, calibrated": comparison.scale}
        ),
        {
            "sgdgp, evidence": _about(posterior),
            "sgdgp, calibrated": {
                "scale": comparison.scale,
                "recommendation": comparison.recommendation,
            },
        },
        batch=_BATCH,
    )


class ScaledPredictor:
    """Predictions of a posterior at several variance scales.

    Args:
        posterior: With scale 1.
        scales: Variance scale of each variant.
    """

    def __init__(
        self, posterior: LinearisedPosterior, scales: dict[str, float]
    ) -> None:
        self._posterior = posterior
        self._scales = scales

    def __call__(self, x: Tensor) -> dict[str, Prediction]:
        """Probit predictions, and samples."""
        f, fluctuations = self._posterior.fluctuations(x, batch_size=len(x))
        return {
            name: linearised(f, scale**0.5 * fluctuations)
            for name, scale in self._scales.items()
        }


def _about(posterior: LinearisedPosterior) -> dict[str, Any]:
    history = posterior.history
    return {
        "precision": posterior.precisions.tolist(),
        "precisions": [step.precisions[0] for step in history],
        "effective_dimension": posterior.effective_dimension,
        "passes": posterior.passes,
        "warnings": list(posterior.warnings),
        "weights": posterior.tangent.num_weights,
    }
