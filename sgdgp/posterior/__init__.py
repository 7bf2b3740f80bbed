"""Posterior functions by pathwise conditioning."""

from sgdgp.posterior.condition import condition
from sgdgp.posterior.functions import SampleFunctions
from sgdgp.posterior.outputs import MultiOutputPosterior
from sgdgp.posterior.pathwise import Marginals, PathwisePosterior
from sgdgp.posterior.storage import Posterior, StorageError, load

__all__ = [
    "Marginals",
    "MultiOutputPosterior",
    "PathwisePosterior",
    "Posterior",
    "SampleFunctions",
    "StorageError",
    "condition",
    "load",
]
