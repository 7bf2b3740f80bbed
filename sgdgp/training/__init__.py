"""Learning hyperparameters from stochastic marginal-likelihood gradients."""

from sgdgp.training.evidence import log_marginal_likelihood
from sgdgp.training.fit import fit
from sgdgp.training.history import FitEntry, Fitted
from sgdgp.training.initialise import initialise
from sgdgp.training.log_determinant import LogLikelihoodEstimate
from sgdgp.training.marginal_likelihood import StochasticMarginalLogLikelihood
from sgdgp.training.plateau import Plateau
from sgdgp.training.probes import PathwiseProbes, Probes, StandardProbes

__all__ = [
    "FitEntry",
    "Fitted",
    "LogLikelihoodEstimate",
    "PathwiseProbes",
    "Plateau",
    "Probes",
    "StandardProbes",
    "StochasticMarginalLogLikelihood",
    "fit",
    "initialise",
    "log_marginal_likelihood",
]
