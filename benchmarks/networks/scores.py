"""Scores of predicted classes: alone, together, far from the data, turned."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.networks.data import ANGLES, Task
from benchmarks.networks.prediction import Fitted, Prediction
from sgdgp.metrics import (
    accuracy,
    auroc,
    brier_score,
    negative_log_likelihood,
    reliability_diagram,
)
from sgdgp.networks.predictive import dyadic_joint_log_prob, predictive_entropy

PAIR_SEED = 0
"""Of the pairs of the joint log-likelihood: all methods meet the same ones."""


@dataclass
class Collected:
    """Predictions of one method for one set of images.

    Attributes:
        probabilities: In batches (b, C).
        joint: Log probability of the true class under each sample, in batches (b, k).
    """

    probabilities: list[Tensor] = field(default_factory=list)
    joint: list[Tensor] = field(default_factory=list)

    def add(self, prediction: Prediction, y: Int[Tensor, " b"] | None) -> None:
        """One batch more, with its classes where samples are scored."""
        self.probabilities.append(prediction.log_probabilities.double().exp())
        if y is not None:
            each = prediction.samples.log_softmax(1)
            rows = y[:, None, None].expand(-1, 1, each.shape[2])
            self.joint.append(each.gather(1, rows).squeeze(1))


def predictions(
    fitted: Fitted, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"] | None = None
) -> dict[str, Collected]:
    """Predictions of every variant of a method, in batches."""
    found: dict[str, Collected] = {}
    classes = [None] * len(x) if y is None else list(y.split(fitted.batch))
    for part, its in zip(x.split(fitted.batch), classes, strict=False):
        for name, prediction in fitted.predict(part).items():
            found.setdefault(name, Collected()).add(prediction, its)
    return found


@torch.no_grad()
def score(task: Task, fitted: Fitted) -> dict[str, dict[str, Any]]:
    """All scores of every variant of a method.

    ``seconds_per_image`` is the time of the test images' predictions, shared by the
    variants of a method.
    """
    start = time.perf_counter()
    test = predictions(fitted, task.test.x, task.test.y)
    seconds = (time.perf_counter() - start) / len(task.test)
    ood = predictions(fitted, task.ood)
    turned = {} if task.rotated is None else predictions(fitted, task.rotated)
    return {
        name: {
            **class_scores(torch.cat(found.probabilities), task.test.y),
            "joint": dyadic_joint_log_prob(
                torch.cat(found.joint), torch.Generator().manual_seed(PAIR_SEED)
            ),
            "auroc": auroc(_doubt(found), _doubt(ood[name])),
            "test_images": len(task.test),
            "seconds_per_image": seconds,
            **_clean(task, torch.cat(found.probabilities)),
            **_rotation(turned.get(name), task.rotated_y),
        }
        for name, found in test.items()
    }


def class_scores(p: Float[Tensor, "n C"], y: Int[Tensor, " n"]) -> dict[str, Any]:
    """Scores of single predictions, and the reliability diagram."""
    diagram = reliability_diagram(p, y)
    return {
        "nll": negative_log_likelihood(p, y),
        "accuracy": accuracy(p, y),
        "ece": diagram.error,
        "brier": brier_score(p, y),
        "reliability": {
            "confidence": diagram.confidence.tolist(),
            "accuracy": diagram.accuracy.tolist(),
            "counts": diagram.counts.tolist(),
        },
    }


def _clean(task: Task, p: Float[Tensor, "n C"]) -> Mapping[str, Any]:
    """Scores against the right classes, where some labels are wrong."""
    if not task.setting.wrong_labels:
        return {}
    scores = class_scores(p, task.clean_y)
    return {"clean": {k: scores[k] for k in ("nll", "ece", "brier", "accuracy")}}


def _rotation(turned: Collected | None, y: Int[Tensor, " r"]) -> Mapping[str, Any]:
    """The curve over angles: loss, accuracy and doubt."""
    if turned is None:
        return {}
    each = torch.cat(turned.probabilities).split(len(y))
    return {
        "rotated": {
            "angle": list(ANGLES),
            "nll": [negative_log_likelihood(p, y) for p in each],
            "accuracy": [accuracy(p, y) for p in each],
            "entropy": [float(predictive_entropy(p).mean()) for p in each],
        }
    }


def _doubt(found: Collected) -> Float[Tensor, " n"]:
    return predictive_entropy(torch.cat(found.probabilities))
