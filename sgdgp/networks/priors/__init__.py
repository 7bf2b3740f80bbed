"""Gaussian priors over the weights of a network: their settings and operators."""

from sgdgp.networks.priors.base import PriorSettings, WeightPrior
from sgdgp.networks.priors.blocks import Block, Estimate, KroneckerSum, MatrixRoot
from sgdgp.networks.priors.diagonal import DiagonalPrior, GPrior, Isotropic, Layerwise
from sgdgp.networks.priors.filters import Filters
from sgdgp.networks.priors.kronecker import Kronecker, KroneckerPrior, precision_sum

__all__ = [
    "Block",
    "DiagonalPrior",
    "Estimate",
    "Filters",
    "GPrior",
    "Isotropic",
    "Kronecker",
    "KroneckerPrior",
    "KroneckerSum",
    "Layerwise",
    "MatrixRoot",
    "PriorSettings",
    "WeightPrior",
    "precision_sum",
]
