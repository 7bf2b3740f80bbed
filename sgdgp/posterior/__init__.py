"""Posterior functions by pathwise conditioning."""

import sgdgp.core.errors
from sgdgp.core.deprecation import also_importable_as
from sgdgp.core.errors import StorageError
from sgdgp.posterior.condition import condition
from sgdgp.posterior.paths import SampleFunctions
from sgdgp.posterior.posterior import (
    Marginals,
    MultiOutputPosterior,
    PathwisePosterior,
    Posterior,
    load,
)

also_importable_as("sgdgp.posterior.checkpoint_file", sgdgp.core.errors)

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
