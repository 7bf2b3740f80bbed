"""Gaussian priors over the weights of a network: their settings and operators."""

from sgdgp.networks.priors.base import DiagonalPrior, KroneckerPrior, WeightPrior
from sgdgp.networks.priors.settings import (
    GPrior,
    Isotropic,
    Kronecker,
    Layerwise,
    PriorSettings,
)

__all__ = [
    "DiagonalPrior",
    "GPrior",
    "Isotropic",
    "Kronecker",
    "KroneckerPrior",
    "Layerwise",
    "PriorSettings",
    "WeightPrior",
]
