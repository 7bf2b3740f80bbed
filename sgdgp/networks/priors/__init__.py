"""Gaussian priors over the weights of a network: their settings and operators."""

from sgdgp.networks.priors.base import PriorSettings, WeightPrior
from sgdgp.networks.priors.diagonal import DiagonalPrior, GPrior, Isotropic, Layerwise
from sgdgp.networks.priors.kronecker import Kronecker, KroneckerPrior, MatrixRoot

__all__ = [
    "DiagonalPrior",
    "GPrior",
    "Isotropic",
    "Kronecker",
    "KroneckerPrior",
    "Layerwise",
    "MatrixRoot",
    "PriorSettings",
    "WeightPrior",
]
