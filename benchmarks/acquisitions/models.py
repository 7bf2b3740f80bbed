"""The two posteriors: of the same definition with the same hyperparameters."""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.fit import fit_gpytorch_mll
from botorch.models import SingleTaskGP
from botorch.models.model import Model
from botorch.models.transforms import Standardize
from botorch.sampling.base import MCSampler
from botorch.sampling.normal import SobolQMCNormalSampler
from gpytorch.mlls import ExactMarginalLogLikelihood
from torch import Tensor

from sgdgp.botorch import PathwiseModel

MC_SAMPLES = 1024
"""Quasi-random samples of an acquisition."""


def fitted(x: Tensor, y: Tensor) -> SingleTaskGP:
    """BoTorch's default model, its hyperparameters learned by BoTorch.

    Args:
        x: Inputs (n, d) in the unit cube.
        y: Values (n, 1).
    """
    model = SingleTaskGP(x, y, outcome_transform=Standardize(m=1))
    fit_gpytorch_mll(ExactMarginalLogLikelihood(model.likelihood, model))
    return model.eval()


def exact(model: SingleTaskGP, seed: int) -> tuple[Model, MCSampler]:
    """BoTorch's closed-form posterior, and quasi-random samples of it."""
    return model, SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)


def pathwise(model: SingleTaskGP, seed: int) -> tuple[Model, MCSampler]:
    """The same posterior by sgdgp, and samples of it by the same sampler."""
    own = PathwiseModel(model, seed=seed)
    return own, SobolQMCNormalSampler(torch.Size([MC_SAMPLES]), seed=seed)


MODELS: dict[str, Callable[[SingleTaskGP, int], tuple[Model, MCSampler]]] = {
    "SingleTaskGP": exact,
    "PathwiseModel": pathwise,
}
