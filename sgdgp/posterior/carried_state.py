"""What a solve leaves for the next one, as a file: to go on exactly after a restart.

A posterior's own file does not have it: it is several times as large, and only saves
passes of a later ``update``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgdgp.core.files import FileKind, read_file, write_file
from sgdgp.solvers.preconditioners import Inverse, LowRankInverse
from sgdgp.solvers.recycling import ExtendedInverse, Recycled
from sgdgp.solvers.two_level import (
    SparseFactor,
    TwoLevelInverse,
    compressed,
    compressed_rows,
)

KIND = FileKind("sgdgp_carried", 1, "solver state")

Parts = tuple[dict[str, Tensor], dict[str, Any]]
"""Tensors by name, and everything else."""


def save_carried(path: str | os.PathLike[str], carried: Recycled) -> None:
    """Write what a solve left behind.

    Of its directions only the leading ones are kept, which are all that is ever used.

    Args:
        path: The file; its directory must exist.
        carried: What ``Solution.recycled`` holds.

    Raises:
        OSError: The file could not be written.
        TypeError: A preconditioner that is not of this package.
    """
    tensors: dict[str, Tensor] = {"residual": carried.residual}
    state: dict[str, Any] = {}
    known = carried.leading()
    if known is not None:
        tensors |= {"directions": known.directions, "images": known.images}
    if carried.inverse is not None:
        parts, state = parts_of(carried.inverse)
        tensors |= {f"inverse.{name}": tensor for name, tensor in parts.items()}
    write_file(Path(path), KIND, tensors, state)


def load_carried(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Recycled:
    """Read what ``save_carried`` wrote.

    Args:
        path: The file.
        device: Where its tensors go.

    Raises:
        UnusableFileError: Not such a file, damaged, or of a newer format.
    """
    tensors, state = read_file(Path(path), KIND)
    tensors = {name: tensor.to(device) for name, tensor in tensors.items()}
    inverse = None
    if state:
        inverse = _inverse(_below("inverse.", tensors), state)
    pairs: tuple[tuple[Tensor, Tensor], ...] = ()
    if "directions" in tensors:
        pairs = ((tensors["directions"], tensors["images"]),)
    return Recycled(tensors["residual"], inverse, pairs)


def settled(carried: Recycled) -> Recycled:
    """The same with its leading directions only, as it is read from a file."""
    known = carried.leading()
    if known is None:
        return carried
    return replace(carried, collected=((known.directions, known.images),))


@singledispatch
def parts_of(inverse: Inverse) -> Parts:
    """The parts of a preconditioner; register those of a new one here."""
    raise TypeError(f"no way to store a {type(inverse).__name__} is registered")


@parts_of.register
def _(inverse: LowRankInverse) -> Parts:
    tensors = {name: getattr(inverse, name) for name in ("scale", "basis", "shrinkage")}
    state = {"passes": inverse.passes, "magnitude": inverse.magnitude}
    return tensors, {"kind": "low_rank", **state}


@parts_of.register
def _(inverse: TwoLevelInverse) -> Parts:
    tensors = {
        "basis": inverse.basis,
        "shrinkage": inverse.shrinkage,
        **_compressed_parts(inverse.sparse.rows),
    }
    return tensors, {
        "kind": "two_level",
        "passes": inverse.passes,
        "explained": inverse.sparse.explained,
        "settings": dict(inverse.settings),
    }


@parts_of.register
def _(inverse: ExtendedInverse) -> Parts:
    tensors, state = parts_of(inverse.inverse)
    tensors = {f"first.{name}": tensor for name, tensor in tensors.items()}
    return tensors | _compressed_parts(inverse.rows), {
        "kind": "appended",
        "first": inverse.first,
        "passes": inverse.passes,
        "settings": dict(inverse.settings),
        "inverse": state,
    }


def _inverse(tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> Inverse:
    """The preconditioner of its parts."""
    if state["kind"] == "low_rank":
        return LowRankInverse(
            tensors["scale"],
            tensors["basis"],
            tensors["shrinkage"],
            state["passes"],
            state["magnitude"],
        )
    if state["kind"] == "two_level":
        n = len(tensors["basis"])
        rows = _compressed(tensors, n)
        return TwoLevelInverse(
            SparseFactor(rows, compressed_transpose(rows), state["explained"]),
            tensors["basis"],
            tensors["shrinkage"],
            state["passes"],
            state["settings"],
        )
    return ExtendedInverse(
        _inverse(_below("first.", tensors), state["inverse"]),
        state["first"],
        _compressed(tensors, state["first"] + len(tensors["starts"]) - 1),
        state["passes"],
        state["settings"],
    )


def compressed_transpose(matrix: Tensor) -> Tensor:
    """The transpose of a matrix in compressed rows, in compressed rows."""
    starts = matrix.crow_indices()
    rows = torch.arange(len(starts) - 1, device=starts.device)
    rows = rows.repeat_interleave(starts.diff())
    shape = (matrix.shape[1], matrix.shape[0])
    return compressed(matrix.col_indices(), rows, matrix.values(), shape)


def _compressed_parts(matrix: Tensor) -> dict[str, Tensor]:
    return {
        "starts": matrix.crow_indices(),
        "columns": matrix.col_indices(),
        "values": matrix.values(),
    }


def _compressed(tensors: Mapping[str, Tensor], columns: int) -> Tensor:
    return compressed_rows(
        tensors["starts"], tensors["columns"], tensors["values"], columns
    )


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }
