"""Learning hyperparameters from stochastic marginal-likelihood gradients."""

from sgdgp.training.evidence import LogLikelihoodEstimate, log_marginal_likelihood
from sgdgp.training.fit import fit
from sgdgp.training.initialise import initialise, initialize
from sgdgp.training.marginal_likelihood import StochasticMarginalLogLikelihood
from sgdgp.training.probes import PathwiseProbes, Probes, StandardProbes
from sgdgp.training.run import FitEntry, Fitted, Plateau

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
    "initialize",
    "log_marginal_likelihood",
]
