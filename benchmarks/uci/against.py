"""How far predictions are from the exact ones at the same hyperparameters."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.data import load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.request import RunRequest
from benchmarks.uci.scores import scores
from benchmarks.uci.trainable import Learnt, centred


@dataclass(frozen=True)
class Reference:
    """Exact mean and variance of the test targets (m,), and their scores."""

    mean: Float[Tensor, " m"]
    variance: Float[Tensor, " m"]
    rmse: float | None
    nll: float | None


def against_exact(
    reference: Reference, mean: Float[Tensor, " m"], variance: Float[Tensor, " m"]
) -> dict[str, float | None]:
    """The reference's scores and the distance of the predictions to it."""
    ratio = variance.double() / reference.variance.to(variance.device)
    difference = mean.double() - reference.mean.to(mean.device)
    return {
        "rmse": reference.rmse,
        "nll": reference.nll,
        "mean_rms_difference": float(difference.square().mean().sqrt()),
        "variance_ratio_mean": float(ratio.mean()),
    }


def exact_at(
    request: RunRequest,
    parameters: Learnt,
    mean: Float[Tensor, " m"],
    variance: Float[Tensor, " m"] | None,
) -> dict[str, Any] | None:
    """The float64 figures at learnt hyperparameters, if the request wants them.

    What a fit has found is told apart from how well it was solved: this is what the
    hyperparameters are worth, log marginal likelihood (per training row) included.
    """
    if request.reference is None:
        return None
    split = load_split(
        request.dataset, request.split, dtype=torch.float64, device=request.device
    )
    split = centred(split, parameters.mean)
    try:
        exact = exact_prediction(split, parameters.values)
    except ValueError as error:  # too large: the fit itself is not lost with it
        print(f"no exact figures for {request.stem}: {error}", file=sys.stderr)
        return None
    figures = scores(exact.mean, exact.variance, split.y_test)
    reference = Reference(
        exact.mean + parameters.mean, exact.variance, figures["rmse"], figures["nll"]
    )
    compared: dict[str, Any] = {"rmse": reference.rmse, "nll": reference.nll}
    if variance is not None:
        compared = dict(against_exact(reference, mean, variance))
    return {
        **compared,
        "log_likelihood_per_row": exact.log_likelihood / len(split.x),
    }
