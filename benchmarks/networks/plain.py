"""The network alone, with a temperature, and an ensemble of networks."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from benchmarks.networks.data import Images
from benchmarks.networks.prediction import Fitted, Prediction
from benchmarks.networks.train import outputs
from sgdgp.networks.calibration import best_temperature


def fit_network(network: nn.Module, calibration: Images) -> Fitted:
    """The network as it is, and with its logits divided by a temperature."""
    t = best_temperature(outputs(network, calibration.x), calibration.y)

    def predict(x: Tensor) -> dict[str, Prediction]:
        f = outputs(network, x)
        return {"network": _certain(f), "network, temperature": _certain(f / t)}

    return Fitted(predict, {"network, temperature": {"temperature": t}})


def fit_ensemble(networks: Sequence[nn.Module]) -> Fitted:
    """The mean of several networks' probabilities; its samples are the networks."""

    def predict(x: Tensor) -> dict[str, Prediction]:
        samples = torch.stack([outputs(network, x) for network in networks], dim=-1)
        mean = samples.log_softmax(1).logsumexp(-1) - math.log(len(networks))
        return {"ensemble": Prediction(mean, samples)}

    return Fitted(predict, {"ensemble": {"members": len(networks)}})


def _certain(f: Float[Tensor, "b C"]) -> Prediction:
    return Prediction(f.log_softmax(1), f.unsqueeze(-1))
