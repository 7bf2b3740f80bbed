"""Posteriors of trained networks by linearised Laplace, and what they teach others."""

from sgdgp.core import codec, processes
from sgdgp.core.deprecation import also_importable_as
from sgdgp.core.processes import process_group, started
from sgdgp.networks import priors
from sgdgp.networks.calibration import Comparison
from sgdgp.networks.certificate import Certificate, certify
from sgdgp.networks.dual import Dual
from sgdgp.networks.hessian_free import HessianFree, OutputVariance
from sgdgp.networks.learned_prior import LearnedPrior
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sgdgp.networks.linearisation import LinearisedNetwork, linearise, linearize
from sgdgp.networks.posterior import LinearisedPosterior, load
from sgdgp.networks.potential import Potential
from sgdgp.networks.predictive import GaussianPrediction
from sgdgp.networks.priors import Filters, GPrior, Isotropic, Kronecker, Layerwise
from sgdgp.networks.sampling import (
    Alignment,
    CompactGaussian,
    Draws,
    HmcProgress,
    PosteriorComparison,
    Symmetry,
    SymmetryGroup,
    align,
    barrier,
    compare,
    ensemble,
    hmc,
    match_weights,
    mean_field,
    prune,
    pruning_masks,
    sparsity_curve,
)
from sgdgp.networks.weight_solvers import (
    WeightCG,
    WeightCholesky,
    WeightKronecker,
    WeightSGD,
)

also_importable_as("sgdgp.networks.processes", processes)
also_importable_as("sgdgp.networks.stored_values", codec)
also_importable_as("sgdgp.networks.weight_priors", priors)

__all__ = [
    "Alignment",
    "Bernoulli",
    "Categorical",
    "Certificate",
    "CompactGaussian",
    "Comparison",
    "Draws",
    "Dual",
    "Filters",
    "GPrior",
    "Gaussian",
    "GaussianPrediction",
    "HessianFree",
    "HmcProgress",
    "Isotropic",
    "Kronecker",
    "Layerwise",
    "LearnedPrior",
    "Likelihood",
    "LinearisedNetwork",
    "LinearisedPosterior",
    "OutputVariance",
    "PosteriorComparison",
    "Potential",
    "Symmetry",
    "SymmetryGroup",
    "WeightCG",
    "WeightCholesky",
    "WeightKronecker",
    "WeightSGD",
    "align",
    "barrier",
    "certify",
    "compare",
    "ensemble",
    "hmc",
    "linearise",
    "linearize",
    "load",
    "match_weights",
    "mean_field",
    "process_group",
    "prune",
    "pruning_masks",
    "sparsity_curve",
    "started",
]
