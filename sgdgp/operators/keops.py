"""K as a KeOps lazy tensor: compiled reductions that never leave the registers.

KeOps is imported at the first use and kept silent. Every formula is compiled once
per machine (10-25 s); hyperparameters are arguments of it, and right-hand sides come
in pieces of 1, 8, 24 or 65 columns, so that four compilations serve all products.
"""

from __future__ import annotations

import contextlib
import functools
import io
import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sgdgp.operators.arguments import take
from sgdgp.operators.base import RowIndex
from sgdgp.operators.tiled import TiledOperator

_PIECES = (1, 8, 24, 65)
"""Columns of a product: each width is compiled once (10-25 s). A piece evaluates all
entries anew, which costs more than columns of zeros; 65 are a mean and 64 samples."""

_FIRST_PRODUCT = """
import torch
from pykeops.torch import Vi, Vj
x = torch.rand(9, 3, device="cuda")
((-(Vi(x) - Vj(x)).sqnorm2()).exp() * Vj(x)).sum(dim=1).cpu()
"""


class KeopsOperator(TiledOperator):
    """K(X1, X2) reduced by KeOps; memory O(n (d + k)).

    The better choice on a GPU with many points. On a CPU it works, but the tiled
    operator is faster and needs no compilation. Blocks, the diagonal and gradients come
    from the tiles.

    Args:
        kernel: A GPyTorch kernel that has a tile form and a formula.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes for the tiles of ``block``. Default: half of what is
            free.

    Raises:
        ImportError: pykeops cannot be imported.
        ValueError: The kernel has no formula.
    """

    name = "keops"
    rows_per_step = 1 << 30  # KeOps takes all rows in one reduction
    sums_tiles = False

    def _prepare(self) -> None:
        super()._prepare()
        self._columns = self.tile.keops_inputs(self.x, self.origin)
        self._rows = (
            self._columns
            if self.is_square
            else self.tile.keops_inputs(self.x_rows, self.origin)
        )
        _need_keops(self.x.device)

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        if v.shape[1] == 0:
            return super()._rows_matmul(index, v)
        keops = import_keops()
        rows = tuple(take(form, index).contiguous() for form in self._rows)
        formula = self.tile.keops_formula(
            tuple(keops.Vi(form) for form in rows),
            tuple(keops.Vj(form) for form in self._columns),
        )
        parts = [
            _reduced(formula, keops, padded)[:, :width] for padded, width in _pieces(v)
        ]
        return torch.cat(parts, 1).mul_(self.tile.factor)


def import_keops() -> ModuleType:
    """``pykeops.torch``, imported without a word on standard output.

    Raises:
        ImportError: pykeops is not installed or does not work here.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            import pykeops
            import pykeops.torch

            pykeops.set_verbose(False)
    except Exception as error:  # a broken compiler fails in many ways
        raise ImportError(
            "the keops operator needs a working pykeops: pip install pykeops, "
            f"and a C++ compiler ({error})"
        ) from error
    return pykeops.torch


def keops_is_available(device: torch.device) -> bool:
    """Whether KeOps works on a device."""
    try:
        _need_keops(device)
    except ImportError:
        return False
    return True


def _need_keops(device: torch.device) -> None:
    """Refuse a KeOps that does not work on a device.

    Raises:
        ImportError: Says what is missing.
    """
    import_keops()
    if device.type == "cuda" and not _survives_on_a_gpu():
        raise ImportError(
            "the keops operator: pykeops ends its process on this GPU; use "
            "operator='tiled'"
        )


@functools.cache
def _survives_on_a_gpu() -> bool:
    """Whether a first product works, tried where it can do no harm.

    With some drivers KeOps 2.3 ends the process by a segmentation fault.
    """
    command = [sys.executable, "-c", _FIRST_PRODUCT]
    try:
        tried = subprocess.run(command, capture_output=True, check=False, timeout=300)
    except subprocess.TimeoutExpired:
        return False
    return tried.returncode == 0


def _reduced(formula: Any, keops: ModuleType, v: Tensor) -> Tensor:
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return (formula * keops.Vj(v)).sum(dim=1)
    except (ImportError, OSError) as error:
        raise ImportError(
            "the keops operator needs a C++ compiler, and a writable folder for what "
            f"it compiles ($KEOPS_CACHE_FOLDER): {error}"
        ) from error


def _pieces(v: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Columns of v (n, k) in pieces of the compiled widths, the last one padded."""
    start = 0
    while start < v.shape[1]:
        left = v.shape[1] - start
        size = next((size for size in _PIECES if size >= left), _PIECES[-1])
        width = min(size, left)
        part = v[:, start : start + width]
        if width < size:
            part = torch.nn.functional.pad(part, (0, size - width))
        yield part.contiguous(), width
        start += width
