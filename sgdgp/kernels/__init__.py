"""Kernels: what is known of each family, in its file, and the ones that we add."""

# What is known of GPyTorch's kernels registers on import.
from sgdgp.kernels import compose as _compose  # noqa: F401
from sgdgp.kernels import index as _index  # noqa: F401
from sgdgp.kernels import stationary as _stationary  # noqa: F401
from sgdgp.kernels.distance import StationaryTile
from sgdgp.kernels.dot_product import InnerProductTile
from sgdgp.kernels.neural_tangent import NeuralTangentKernel
from sgdgp.kernels.registry import (
    TileKernel,
    differentiable_tile,
    register_kernel,
    register_tile_gradient,
    register_tile_kernel,
    scalar,
    select,
    tile_kernel,
)
from sgdgp.kernels.tanimoto import TanimotoKernel

__all__ = [
    "InnerProductTile",
    "NeuralTangentKernel",
    "StationaryTile",
    "TanimotoKernel",
    "TileKernel",
    "differentiable_tile",
    "register_kernel",
    "register_tile_gradient",
    "register_tile_kernel",
    "scalar",
    "select",
    "tile_kernel",
]
