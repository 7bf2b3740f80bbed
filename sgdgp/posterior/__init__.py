"""Posterior functions by pathwise conditioning."""

from sgdgp.core.errors import StorageError
from sgdgp.posterior.condition import condition
from sgdgp.posterior.functions import SampleFunctions
from sgdgp.posterior.outputs import MultiOutputPosterior
from sgdgp.posterior.pathwise import Marginals, PathwisePosterior
from sgdgp.posterior.storage import Posterior, load

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
