"""Posterior functions by pathwise conditioning."""

from sgdgp.posterior.condition import condition
from sgdgp.posterior.functions import SampleFunctions
from sgdgp.posterior.pathwise import Marginals, PathwisePosterior
from sgdgp.posterior.storage import StorageError, load

__all__ = [
    "Marginals",
    "PathwisePosterior",
    "SampleFunctions",
    "StorageError",
    "condition",
    "load",
]
