"""Requests for peers on the tiny set, and the truth about their results."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.uci.data import Split
from benchmarks.uci.hyperparameters import Hyperparameters
from benchmarks.uci.request import FIT, PEERS, RunRequest

if TYPE_CHECKING:
    pass


def peer(name: str, **options: Any) -> RunRequest:
    return RunRequest("tiny", 0, PEERS[name], hyperparameters=FIT, **options)


def values_of(result: dict[str, Any]) -> tuple[float, Hyperparameters]:
    found = dict(result["fit"]["parameters"])
    mean = found.pop("mean")
    return mean, Hyperparameters(
        **{**found, "lengthscale": tuple(found["lengthscale"])}
    )


def dense_log_likelihood(split: Split, mean: float, values: Hyperparameters) -> float:
    scale = torch.tensor(values.lengthscale, dtype=torch.float64)
    r = math.sqrt(3) * torch.cdist(split.x / scale, split.x / scale)
    k = values.signal_scale**2 * (1 + r) * torch.exp(-r)
    h = k + values.noise_scale**2 * torch.eye(len(r), dtype=torch.float64)
    prior = torch.distributions.MultivariateNormal(
        torch.full((len(r),), mean, dtype=torch.float64), h
    )
    return float(prior.log_prob(split.y))
