"""BoTorch around sgdgp: ``PathwiseModel``, a model made of functions."""

try:
    import botorch as _botorch  # noqa: F401
except ImportError as error:
    raise ImportError(
        "sgdgp.botorch needs BoTorch; install it with pip install 'sgdgp[botorch]'"
    ) from error

# Imported for what they register with BoTorch.
from sgdgp.botorch import kernel_features as _kernel_features  # noqa: F401
from sgdgp.botorch import multitask_paths as _multitask_paths  # noqa: F401
from sgdgp.botorch import paths as _paths  # noqa: F401
from sgdgp.botorch.iterative_update import iterative_update
from sgdgp.botorch.model import PathwiseModel
from sgdgp.botorch.posterior import PathPosterior, PathSampler

__all__ = ["PathPosterior", "PathSampler", "PathwiseModel", "iterative_update"]
