"""The priors that are compared, and what is asked of each."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks.networks.scores import class_scores
from sgdgp.networks import (
    GPrior,
    LearnedPrior,
    Likelihood,
    LinearisedPosterior,
    certify,
    linearise,
)
from sgdgp.networks.priors import PriorSettings
from sgdgp.tangent import Tangent

SAMPLES = 256
DELTA = 0.05

Record = dict[str, Any]
"""Of one method: what it was given and what it scored."""

Examples = tuple[Tensor, Tensor]
"""Inputs and targets."""


@dataclass(frozen=True)
class AboutNetwork(GPrior):
    """The g-prior about the network's weights: it knows the source's mean as others."""

    def centre(self, tangent: Tangent) -> Float[Tensor, "D 1"]:
        """Nothing."""
        return torch.zeros_like(tangent.theta)


def priors_of(
    network: nn.Module, likelihood: Likelihood, source: Examples
) -> dict[str, PriorSettings]:
    """All about the source's weights.

    "learned" has its strength from the target's evidence, which a certificate pays for;
    at "strength 1" an example of the source counts as one of the target.
    """
    learned = LearnedPrior.from_data(network, likelihood, TensorDataset(*source))
    return {
        "learned": learned,
        "strength 1": replace(learned, strength=1.0),
        "isotropic": replace(learned, strength=0.0),
        "g-prior": AboutNetwork(),
    }


def measured(
    network: nn.Module,
    likelihood: Likelihood,
    prior: PriorSettings,
    train: Examples,
    test: Examples,
    *,
    tolerance: float | None,
    seed: int,
) -> Record:
    """Scores of a posterior, and its certificate where the prior allows of one."""
    start = time.perf_counter()
    data = TensorDataset(*train)
    posterior = linearise(network, likelihood, prior=prior).fit(
        data, progress=False, seed=seed, final_samples=SAMPLES
    )
    seconds = time.perf_counter() - start
    found = {
        **scores(posterior, test),
        "evidence": posterior.log_marginal_likelihood(data).value,
        "precision": float(posterior.precisions[0]),
        "seconds": seconds,
    }
    settings = posterior.settings
    if isinstance(settings, LearnedPrior):
        found["strength"] = settings.strength
        found |= _certified(posterior, data, TensorDataset(*test), tolerance, seed)
    return found


def scores(posterior: LinearisedPosterior, test: Examples) -> Record:
    """Test NLL, of classes with calibration error and accuracy.

    Classes are predicted by the mean over samples: the probit link takes for doubt what
    all logits have in common.
    """
    x, y = test
    found = posterior.predict(x, "monte_carlo")
    if isinstance(found, Tensor):
        return class_record(found, y)
    return {"nll": -float(found.log_density(y).mean())}


def class_record(p: Float[Tensor, "n C"], y: Tensor) -> Record:
    """Of probabilities."""
    found: Mapping[str, Any] = class_scores(p, y)
    return {name: found[name] for name in ("nll", "ece", "accuracy")}


def _certified(
    posterior: LinearisedPosterior,
    data: Dataset[Any],
    test: Dataset[Any],
    tolerance: float | None,
    seed: int,
) -> Record:
    start = time.perf_counter()
    found = certify(posterior, data, delta=DELTA, tolerance=tolerance, seed=seed)
    return {
        "bound": found.bound,
        "mcallester": found.mcallester,
        "catoni": found.catoni,
        "risk": found.risk,
        "kl": found.kl,
        "chance": found.chance,
        "test_risk": found.gibbs_risk(test),
        "certificate_seconds": time.perf_counter() - start,
    }
