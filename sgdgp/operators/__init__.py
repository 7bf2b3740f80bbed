"""Kernel operators: row blocks of a kernel matrix times a matrix.

``choose_operator`` picks one of six by memory and size: on tensor cores (triton), in
memory (dense), fused tiles (tiled), KeOps (keops), exact features (features), and row
blocks through GPyTorch for every other kernel (row_blocks). ``operators.triton`` is
imported only where it is used.
"""

from __future__ import annotations

from sgdgp.kernels.registry import (
    TileKernel,
    register_tile_gradient,
    register_tile_kernel,
    tile_kernel,
)
from sgdgp.operators.base import KernelOperator, RowBlock, RowIndex
from sgdgp.operators.choose import choose_operator, operator_by_name
from sgdgp.operators.dense import DenseOperator, streaming_operator
from sgdgp.operators.evaluation import check_kernel
from sgdgp.operators.feature import FeatureKernel, FeatureOperator
from sgdgp.operators.keops import KeopsOperator
from sgdgp.operators.row_blocks import RowBlocksOperator
from sgdgp.operators.sharded import ShardedOperator
from sgdgp.operators.tiled import TiledOperator

__all__ = [
    "DenseOperator",
    "FeatureKernel",
    "FeatureOperator",
    "KeopsOperator",
    "KernelOperator",
    "RowBlock",
    "RowBlocksOperator",
    "RowIndex",
    "ShardedOperator",
    "TileKernel",
    "TiledOperator",
    "check_kernel",
    "choose_operator",
    "operator_by_name",
    "register_tile_gradient",
    "register_tile_kernel",
    "streaming_operator",
    "tile_kernel",
]
