"""Posterior functions by pathwise conditioning."""

from sgdgp.posterior.condition import condition
from sgdgp.posterior.functions import SampleFunctions
from sgdgp.posterior.pathwise import Marginals, PathwisePosterior

__all__ = ["Marginals", "PathwisePosterior", "SampleFunctions", "condition"]
