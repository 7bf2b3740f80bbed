"""Posteriors of trained networks: linearised Laplace at any size."""

from sgdgp.core.processes import started
from sgdgp.networks.comparison import Comparison
from sgdgp.networks.dual_solver import Dual
from sgdgp.networks.likelihoods import Categorical, Gaussian, Likelihood
from sgdgp.networks.linearised import LinearisedNetwork, linearise
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.predictive import GaussianPrediction
from sgdgp.networks.storage import load
from sgdgp.networks.weight_priors import GPrior, Isotropic, Kronecker, Layerwise
from sgdgp.networks.weight_solvers import WeightCG, WeightSGD

__all__ = [
    "Categorical",
    "Comparison",
    "Dual",
    "GPrior",
    "Gaussian",
    "GaussianPrediction",
    "Isotropic",
    "Kronecker",
    "Layerwise",
    "Likelihood",
    "LinearisedNetwork",
    "LinearisedPosterior",
    "WeightCG",
    "WeightSGD",
    "linearise",
    "load",
    "started",
]
