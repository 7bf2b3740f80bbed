"""Small problems of BoTorch models that the tests share."""

from __future__ import annotations

import warnings

import torch
from botorch.exceptions.warnings import InputDataWarning
from botorch.models import KroneckerMultiTaskGP, ModelListGP, SingleTaskGP
from botorch.models.transforms import Log, Normalize, Standardize
from torch import Tensor

from sgdgp.botorch import PathwiseModel

SAMPLES = 64


def inputs(n: int, seed: int = 0, *batch: int) -> Tensor:
    """Points in [0, 4]^2."""
    generator = torch.Generator().manual_seed(seed)
    return 4 * torch.rand(*batch, n, 2, generator=generator, dtype=torch.float64)


def targets(x: Tensor, outputs: int = 1) -> Tensor:
    """Positive smooth values, one column for each output."""
    columns = [
        torch.exp(torch.sin(x[..., 0] + i) + 0.3 * torch.cos((1 + i) * x[..., 1]))
        for i in range(outputs)
    ]
    return torch.stack(columns, dim=-1)


def single(n: int = 25, *, transform: bool = True, log: bool = False) -> SingleTaskGP:
    """A model of one output."""
    x = inputs(n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", InputDataWarning)
        return SingleTaskGP(
            x,
            targets(x),
            input_transform=Normalize(2) if transform else None,
            outcome_transform=Log() if log else Standardize(1) if transform else None,
        )


def batched(n: int = 25) -> SingleTaskGP:
    """A model of two independent outputs, each with hyperparameters of its own."""
    x = inputs(n)
    model = SingleTaskGP(
        x,
        targets(x, 2),
        input_transform=Normalize(2),
        outcome_transform=Standardize(2),
    )
    with torch.no_grad():
        model.covar_module.raw_lengthscale[1] += 0.7
        model.likelihood.raw_noise[1] += 0.5
    return model


def listed() -> ModelListGP:
    """Two outputs with different data."""
    return ModelListGP(single(25), single(20))


def correlated(n: int = 20) -> KroneckerMultiTaskGP:
    """A model of two correlated outputs."""
    x = inputs(n)
    return KroneckerMultiTaskGP(x, targets(x, 2), outcome_transform=Standardize(2))


def pathwise(definition: torch.nn.Module, **settings: object) -> PathwiseModel:
    """A model that is quick to evaluate."""
    settings = {"num_samples": SAMPLES, "num_features": 512, **settings}
    return PathwiseModel(definition, **settings)  # type: ignore[arg-type]
