"""The state of a fit before its first step: prior, noise, precision, prior draws."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import derived_generator
from sgdgp.networks.curvature import TangentData, WeightSystem, curvature_probes
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.run_state import CurvatureAt, RunState, Schedule
from sgdgp.networks.weight_priors import PriorSettings

_POWER_STEPS = 5


def start(
    data: TangentData,
    likelihood: Likelihood,
    settings: PriorSettings,
    schedule: Schedule,
    curvature_at: CurvatureAt,
) -> RunState:
    """The state before the first step: prior, noise and precision to start from."""
    passes = 2.0
    outputs = data.network_outputs()
    likelihood.check_targets(data.targets, outputs.shape[1])
    if isinstance(likelihood, Gaussian) and likelihood.learns_noise:
        likelihood = _first_noise(data, likelihood, outputs)
    if curvature_at == "linear":
        outputs = torch.zeros_like(outputs)
    seed = schedule.seed
    prior = settings.build(
        data.tangent,
        lambda count: curvature_probes(data, likelihood, outputs, count, seed),
    )
    system = WeightSystem(data, prior, likelihood, outputs)
    precision = schedule.precision
    if precision is None:
        precision = _largest_eigenvalue(system, seed)
        passes += 1.0 + _POWER_STEPS
    prior = prior.with_precisions(torch.full_like(prior.precisions, precision))
    empty = data.zeros(1)
    samples = prior_draws(empty, range(schedule.num_samples), seed)
    return RunState(prior, likelihood, empty, samples, passes=passes)


def _first_noise(
    data: TangentData, likelihood: Gaussian, outputs: Float[Tensor, "r C"]
) -> Gaussian:
    """The noise the network itself leaves, not below 1e-4 of the targets' scale."""
    errors = data.total(likelihood.squared_error(outputs, data.targets))
    nothing = torch.zeros_like(outputs)
    squares = data.total(likelihood.squared_error(nothing, data.targets))
    floor = 1e-4 * squares.clamp_min(torch.finfo(outputs.dtype).tiny)
    if not bool(squares.any()):
        raise ValueError(
            "loader: all targets are zero, so there is no noise to learn; give it as "
            "Gaussian(noise=...)"
        )
    return likelihood.update_noise(errors.maximum(floor), data.stream.num_examples, 0.0)


def _largest_eigenvalue(system: WeightSystem, seed: int) -> float:
    """Largest eigenvalue of phi^T phi, by power iteration from a noise draw."""
    v = system.noise(range(1), seed)
    value = float(v.norm())
    for _ in range(_POWER_STEPS):
        if not value > 0:
            break
        v = system.product(v / value)
        value = float(v.norm())
    if not 0 < value < float("inf"):
        raise ValueError(
            "network: its Jacobian in the chosen weights is zero or not finite on the "
            f"training data (largest eigenvalue of the curvature: {value})"
        )
    return value


def prior_draws(
    like: Float[Tensor, "D k"], columns: range, seed: int
) -> Float[Tensor, "D c"]:
    """theta_0 ~ N(0, I) of the samples with these numbers (D, c), like ``like``."""
    rows = torch.empty(len(columns), like.shape[0], dtype=like.dtype)
    for row, column in zip(rows, columns, strict=True):
        row.normal_(generator=derived_generator(seed, "prior weights", column))
    return rows.to(like.device).mT
