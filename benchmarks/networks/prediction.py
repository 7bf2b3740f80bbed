"""What a method predicts, the same for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.predictive import log_probit, variance_of


@dataclass(frozen=True)
class Prediction:
    """Predicted classes of a batch.

    Attributes:
        log_probabilities: Of each class (b, C).
        samples: Logits of each sample (b, C, k); for joint predictions.
    """

    log_probabilities: Float[Tensor, "b C"]
    samples: Float[Tensor, "b C k"]


Predictor: TypeAlias = Callable[[Tensor], Mapping[str, Prediction]]
"""From images to the predictions of each variant of a method."""


@dataclass(frozen=True)
class Fitted:
    """A method ready to predict.

    Attributes:
        predict: Its variants' predictions.
        about: What each variant has chosen, for the record.
        batch: Images it takes at once.
    """

    predict: Predictor
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    batch: int = 200


def linearised(
    f: Float[Tensor, "b C"],
    fluctuations: Float[Tensor, "b C k"],
    variance: Float[Tensor, "b C"] | None = None,
) -> Prediction:
    """The prediction of a linearised network with the probit link.

    Args:
        f: The network's outputs.
        fluctuations: Samples around them.
        variance: Their variances where known, else those of the samples.
    """
    variance = variance_of(fluctuations) if variance is None else variance
    return Prediction(log_probit(f, variance), f.unsqueeze(-1) + fluctuations)
