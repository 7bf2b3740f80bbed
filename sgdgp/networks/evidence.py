"""The evidence of a linearised network, and which mean it speaks for.

At the optimum vbar of the linear model the Laplace approximation of its log marginal
likelihood is

    log p(y) = log p(y | J R vbar) - |vbar|^2 / 2 - log det(phi^T phi + I) / 2,

exact where the likelihood is Gaussian. The determinant is found by stochastic Lanczos
quadrature (``lanczos.py``).

The network itself is a point of the same model, with its trained weights theta in place
of R vbar and its own outputs. Its evidence is taken at the precision and the noise that
suit it best: both only scale phi^T phi, so that the same quadrature knows all of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import derived_generator
from sgdgp.networks.curvature import WeightSystem
from sgdgp.networks.lanczos import Lanczos, random_signs
from sgdgp.networks.likelihoods import Gaussian

EXACT_SIZE = 512
"""Up to so many weights phi^T phi is formed, by one pass, and its determinant exact."""

_MOST_STEPS = 60
"""Lanczos steps, each a pass over the data."""

_SETTLED = 1e-3
"""Relative change of the log determinant in a step that ends them."""

_MOST_ROUNDS, _FIXED = 200, 1e-4
"""Of the fixed point of precision and noise, and the change of its logarithm there."""


@dataclass(frozen=True)
class Evidence:
    """A log marginal likelihood.

    Attributes:
        value: Of all targets together, in nats.
        standard_error: Of the value, from the spread over the probes; 0 if exact.
        passes: Passes over the data that it took.
    """

    value: float
    standard_error: float
    passes: float


@dataclass(frozen=True)
class Spectrum:
    """Eigenvalues mu of phi^T phi: each row has them all, or stands for them.

    Attributes:
        nodes: Where a function is evaluated (p, m).
        weights: How often each counts (p, m).
        passes: Passes over the data.
    """

    nodes: Float[Tensor, "p m"]
    weights: Float[Tensor, "p m"]
    passes: float

    def log_determinants(self, factor: float = 1.0) -> Float[Tensor, " p"]:
        """Log det(factor phi^T phi + I) by each row."""
        return (self.weights * (factor * self.nodes).log1p()).sum(1)

    def dimension(self, factor: float) -> float:
        """Effective dimension, the sum of factor mu / (factor mu + 1)."""
        scaled = factor * self.nodes
        return float((self.weights * scaled / (scaled + 1)).sum(1).mean())


@torch.no_grad()
def spectrum_of(system: WeightSystem, num_probes: int, seed: int) -> Spectrum:
    """The eigenvalues themselves for few weights or rows, else by Lanczos runs.

    Args:
        system: phi.
        num_probes: Runs, side by side.
        seed: Of their starts, signs.
    """
    size, like = system.num_weights, system.outputs
    smaller = system.data.num_rows if system.is_wide else size
    cheap = system.data.has_cheap_gram(system.likelihood)
    if cheap or (smaller <= EXACT_SIZE and not system.is_wide):
        values = torch.linalg.eigvalsh(system.smaller_gram).clamp_min(0.0).unsqueeze(0)
        return Spectrum(values, torch.ones_like(values), 1.0)
    streams = [derived_generator(seed, "evidence", i) for i in range(num_probes)]
    start = random_signs(size, streams, like)
    run, estimate = Lanczos(system.product, start / math.sqrt(size)), -math.inf
    while True:
        run.step()
        nodes, weights = run.quadrature()
        found = Spectrum(nodes.clamp_min(0.0), weights, float(run.steps))
        last, estimate = estimate, float(found.log_determinants().mean())
        settled = abs(estimate - last) <= _SETTLED * abs(estimate)
        if settled or run.steps == _MOST_STEPS or run.has_ended:
            return found


def linear_evidence(
    mean: Float[Tensor, "D 1"], loss: float, spectrum: Spectrum
) -> Evidence:
    """Of the linear model.

    Args:
        mean: vbar, whitened.
        loss: Negative log-likelihood there.
        spectrum: With the likelihood linearised there.
    """
    logs = spectrum.log_determinants()
    error = 0.5 * float(logs.std()) / math.sqrt(len(logs)) if len(logs) > 1 else 0.0
    complexity = float(mean.double().square().sum()) + float(logs.mean())
    return Evidence(-loss - 0.5 * complexity, error, spectrum.passes)


def network_evidence(
    system: WeightSystem,
    theta: Float[Tensor, "D 1"],
    outputs: Float[Tensor, "r C"],
    spectrum: Spectrum,
) -> float:
    """Of a regression network itself, at the precision and noise that suit it.

    Args:
        system: Prior and noise that ``spectrum`` belongs to.
        theta: Trained weights.
        outputs: Of the network.
        spectrum: Of ``system``.
    """
    likelihood, data = system.likelihood, system.data
    assert isinstance(likelihood, Gaussian)
    weights = system.prior.whiten(theta)
    square = float(weights.double().square().sum())
    errors = data.total(likelihood.squared_error(outputs, data.targets))
    error = float((errors / errors.new_tensor(likelihood.variance)).sum())
    count = data.stream.num_examples * outputs.shape[1]
    # Precision and noise over those of the system, at a fixed point of the evidence.
    precision = noise = 1.0
    for _ in range(_MOST_ROUNDS):
        before = precision * noise
        gamma = spectrum.dimension(1 / before)
        precision *= math.sqrt(gamma / (square * precision))
        if likelihood.learns_noise:
            noise *= math.sqrt(error / (count - min(gamma, 0.99 * count)) / noise)
        if abs(math.log(precision * noise / before)) < _FIXED:
            break
    constant = float(system.loss(outputs.unsqueeze(-1))[0]) - 0.5 * error
    loss = constant + 0.5 * (error / noise + count * math.log(noise))
    logs = spectrum.log_determinants(1 / (precision * noise))
    return -loss - 0.5 * (precision * square + float(logs.mean()))
