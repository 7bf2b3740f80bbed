"""sgdgp: Gaussian processes by stochastic optimisation of one linear solve.

Rooms of their own: ``sgdgp.networks`` (posteriors of trained networks),
``sgdgp.tomography`` (of reconstructed images),
``sgdgp.bayesopt`` (Thompson sampling), ``sgdgp.kernels``, ``sgdgp.features``,
``sgdgp.operators``, ``sgdgp.solvers``, ``sgdgp.training``; with their extras installed,
``sgdgp.plot``, ``sgdgp.botorch``, ``sgdgp.sklearn`` and the command ``sgdgp``.
"""

import contextlib
import importlib.util
import io
import os
import tempfile
from pathlib import Path

if importlib.util.find_spec("pykeops") and "KEOPS_CACHE_FOLDER" not in os.environ:
    # GPyTorch imports KeOps, which fails without a place for what it compiles.
    _home = Path("~").expanduser() / ".cache"
    with contextlib.suppress(OSError):
        _home.mkdir(parents=True, exist_ok=True)
    if not os.access(_home, os.W_OK):
        os.environ["KEOPS_CACHE_FOLDER"] = tempfile.mkdtemp(prefix="keops-")

# It also reports on standard output that it found no GPU.
with contextlib.redirect_stdout(io.StringIO()):
    import gpytorch as _gpytorch  # noqa: F401

from sgdgp import bayesopt, kernels, metrics, networks, plot, tomography  # noqa: F401
from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import (
    CheckpointError,
    NotStorableError,
    SgdgpError,
    StorageError,
)
from sgdgp.core.files import load
from sgdgp.core.team import distribute
from sgdgp.features import (
    FeatureMap,
    FeatureRequest,
    NoRandomFeatures,
    random_features,
    register_features,
)
from sgdgp.gpytorch_adapter import UnsupportedModelError
from sgdgp.kernels import TileKernel, register_kernel, register_tile_kernel
from sgdgp.operators import KernelOperator, choose_operator
from sgdgp.posterior import MultiOutputPosterior, PathwisePosterior, condition
from sgdgp.solvers import (
    ADASAP,
    CG,
    SDD,
    SGD,
    AlternatingProjections,
    Auto,
    Cholesky,
    Solution,
    Solver,
)
from sgdgp.training import (
    StochasticMarginalLogLikelihood,
    fit,
    initialise,
    initialize,
    log_marginal_likelihood,
)

__version__ = "0.2.0"

__all__ = [
    "ADASAP",
    "CG",
    "SDD",
    "SGD",
    "AlternatingProjections",
    "Auto",
    "CheckpointError",
    "Cholesky",
    "FeatureMap",
    "FeatureRequest",
    "KernelOperator",
    "MultiOutputPosterior",
    "NoRandomFeatures",
    "NotStorableError",
    "PathwisePosterior",
    "SgdgpError",
    "Solution",
    "Solver",
    "StochasticMarginalLogLikelihood",
    "StorageError",
    "TileKernel",
    "UnsupportedModelError",
    "__version__",
    "choose_operator",
    "condition",
    "distribute",
    "fit",
    "initialise",
    "initialize",
    "load",
    "log_marginal_likelihood",
    "metrics",
    "random_features",
    "register_features",
    "register_kernel",
    "register_stored_class",
    "register_tile_kernel",
]
