"""The exact posterior of a small linearised network, dense in float64.

The same model as sgdgp's: one prior precision, found by the evidence of the linear
model; curvature at the linear model's outputs. Nothing is sampled but the joint
predictions, so that what is left between the two is the error of sampling.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from benchmarks.networks.data import Task
from benchmarks.networks.eigenbasis import Eigenbasis, EigenPredictor, at_edge
from benchmarks.networks.laplace_baselines import example_jacobians
from benchmarks.networks.prediction import Fitted
from sgdgp.networks.likelihoods import Categorical

LARGEST = 4000
"""More weights than this are too many for dense float64 matrices here."""

_EM_STEPS = 50
_NEWTON_STEPS = 50


def fit_exact(task: Task, network: nn.Module, *, num_samples: int, seed: int) -> Fitted:
    """Exact full-covariance posterior with an isotropic prior.

    Raises:
        ValueError: The network has too many weights.
    """
    size = sum(p.numel() for p in network.parameters())
    if size > LARGEST:
        raise ValueError(f"network: found {size} weights, expected at most {LARGEST}")
    network = copy.deepcopy(network).double()
    jacobian_of = example_jacobians(network)
    parts = [jacobian_of(x.double())[1] for x, _ in task.train.loader()]
    precision, curvature = evidence_optimum(torch.cat(parts), task.train.y)
    eigenvalues, vectors = torch.linalg.eigh(curvature)

    def rotated(x: Tensor) -> tuple[Tensor, Tensor]:
        f, jacobian = jacobian_of(x.double())
        return f, jacobian @ vectors

    posterior = Eigenbasis(rotated, eigenvalues.clamp_min(0.0))
    chosen = posterior.calibrated_precision(task.calibration)
    precisions = {"exact, evidence": precision, "exact, calibrated": chosen}
    dimension = float((eigenvalues / (eigenvalues + precision)).sum())
    about = {
        "exact, evidence": {
            "precision": precision,
            "effective_dimension": dimension,
            "weights": size,
        },
        "exact, calibrated": {"precision": chosen, "edge": at_edge(chosen)},
    }
    predictor = EigenPredictor(posterior, precisions, num_samples, seed)
    return Fitted(predictor, about, batch=100)


def evidence_optimum(
    jacobian: Float[Tensor, "n C D"], y: Int[Tensor, " n"], precision: float = 10.0
) -> tuple[float, Float[Tensor, "D D"]]:
    """Fixed point of alpha = gamma / |w|^2, and the curvature there.

    Args:
        jacobian: Of the training images.
        y: Their classes.
        precision: Where to start.
    """
    w = jacobian.new_zeros(jacobian.shape[2])
    curvature = jacobian.new_zeros(len(w), len(w))
    for _ in range(_EM_STEPS):
        w, curvature = linear_optimum(jacobian, y, precision, w)
        eigenvalues = torch.linalg.eigvalsh(curvature).clamp_min(0.0)
        gamma = float((eigenvalues / (eigenvalues + precision)).sum())
        before, precision = precision, gamma / float(w.square().sum())
        if abs(precision / before - 1.0) < 1e-3:
            break
    return precision, curvature


def linear_optimum(
    jacobian: Float[Tensor, "n C D"],
    y: Int[Tensor, " n"],
    precision: float,
    start: Float[Tensor, " D"],
) -> tuple[Float[Tensor, " D"], Float[Tensor, "D D"]]:
    """Optimum of the linear model without offset by Newton's method; G at it."""
    likelihood, flat = Categorical(), jacobian.flatten(0, 1)
    w = start.clone()

    def objective(w: Tensor) -> float:
        loss = likelihood.loss((flat @ w).view(jacobian.shape[:2]), y).sum()
        return float(loss + 0.5 * precision * w.square().sum())

    value = objective(w)
    for _ in range(_NEWTON_STEPS):
        f = (flat @ w).view(jacobian.shape[:2])
        gradient = flat.mT @ likelihood.gradient(f, y).flatten() + precision * w
        curvature = _curvature(likelihood, f, jacobian)
        system = curvature + precision * torch.eye(len(w), dtype=w.dtype)
        step = torch.cholesky_solve(
            gradient.unsqueeze(1), torch.linalg.cholesky(system)
        ).squeeze(1)
        length = 1.0
        while objective(w - length * step) > value and length > 1e-4:
            length /= 2.0
        w = w - length * step
        before, value = value, objective(w)
        if before - value <= 1e-10 * abs(before):
            break
    return w, _curvature(likelihood, (flat @ w).view(jacobian.shape[:2]), jacobian)


def _curvature(
    likelihood: Categorical,
    f: Float[Tensor, "n C"],
    jacobian: Float[Tensor, "n C D"],
) -> Float[Tensor, "D D"]:
    return jacobian.flatten(0, 1).mT @ likelihood.hessian(f, jacobian).flatten(0, 1)
