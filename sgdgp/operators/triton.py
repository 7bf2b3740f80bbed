"""K V on a GPU's tensor cores by one Triton kernel: tiles that never leave the chip.

Legend: z (n, d) inputs over lengthscales times ``input_scale``, E = -|z - z'|^2, P the
tile values at E, normalised to one at distance zero.

Distances. z = hi + lo, both float16, and the columns of one product

    [hi, hi, lo, n, 1] . [2 hi', 2 lo', 2 hi', -1, -n'] = -|hi + lo - hi' - lo'|^2

up to lo lo', with n the squared norm as the product leaves it, in two or three float16
digits: near points cancel to nothing, and rounding only moves the inputs by 2^-22. In
up to three dimensions, and in tiles that hold a pair closer than the rounding of this
product, differences of float32 are squared instead. So zero distance is exact, on the
diagonal and for duplicates.

Products. P = hi + lo and V = hi + lo take three products, hi hi + lo hi + hi lo, summed
in float32 over tiles. P is scaled by 2^10 and V by its largest entry, so that neither
underflows. One column is summed without tensor cores. "medium" leaves all lo away.

Measured as a prototype on one H100 (triton 3.6), n = 100,000, d = 9: 15 to 60 times the
tiled operator, and faster than a product with K in memory. This module has not run on
a GPU yet: its numbers are checked in Triton's interpreter, and it compiles for sm_90.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.slices import slices
from sgdgp.kernels.compose import ProductTile, SumTile
from sgdgp.kernels.distance import DIRECT_DIMENSIONS, StationaryTile
from sgdgp.kernels.registry import TileKernel
from sgdgp.kernels.stationary import (
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    RationalQuadraticTile,
    RBFTile,
)
from sgdgp.operators.arguments import index_length, piece
from sgdgp.operators.base import RowIndex
from sgdgp.operators.tiled import TiledOperator

_MOST_PARTS = 3
_WIDEST = 320
"""Columns of the operand of all parts: two tiles of rows of it fit on the chip."""

_LARGEST_NORM = {"high": 4096.0, "medium": 256.0}
"""Squared norms of scaled inputs up to which rounding is worth it: above, tiles."""

_CANCELLED = 2.0**-12
"""Squared distances below this part of the largest squared norm have lost digits."""

_LARGEST_ALPHA = 16.0
"""Of a rational quadratic kernel: the error of log2(1 + d2) is multiplied by it."""

_RBF, _RATIONAL_QUADRATIC = 0, 1
_PROFILES = {
    RBFTile.profile: _RBF,
    RationalQuadraticTile.profile: _RATIONAL_QUADRATIC,
    Matern12Tile.profile: 2,
    Matern32Tile.profile: 3,
    Matern52Tile.profile: 4,
}
"""What the kernel calls a profile. By its method, so that a subclass that overrides it
is not taken for its parent."""

_TILE = 64
_LONGEST = 2**15 - 1
"""Tiles of a split: their numbers are held in 16 bits."""

_MOST_TILES = 2**25
"""Tiles of a launch, so that its list of near pairs takes at most 64 MB."""

_FILLED = 2112
"""Programs that keep a GPU busy: 16 for each of 132 multiprocessors."""

_WIDTHS = ((1, 0), (16, 0), (32, 0), (64, 0), (64, 16))
"""Columns of a launch: one summed without tensor cores, or one or two products."""

Split: TypeAlias = tuple[int, int]
"""Two widths, powers of two or zero, of one operand."""


@dataclass(frozen=True)
class _Link:
    """One of p = (w1 p1) o2 (w2 p2) o3 (w3 p3), taken from the left.

    Attributes:
        operation: "+" or "*"; "" of the first. What is multiplied has no weight.
        weight: w.
        profile: p, one at distance zero.
        tiles: Whose inputs it sees, side by side.
    """

    operation: str
    weight: float
    profile: int
    tiles: tuple[StationaryTile, ...]

    @property
    def alpha(self) -> float:
        """The shape parameter, if there is one."""
        return float(self.tiles[0].shape_parameter or 1.0)

    def scaled(self, x: Tensor, origin: Tensor) -> Tensor:
        """The inputs of the part (n, d)."""
        return torch.cat([tile.scaled(x, origin) for tile in self.tiles], 1)


def _chain(tile: TileKernel) -> list[_Link] | None:
    """tile(x, x') in links, None where it is anything else."""
    if isinstance(tile, StationaryTile):
        profile = _PROFILES.get(type(tile).profile)
        return None if profile is None else [_Link("", tile.at_zero, profile, (tile,))]
    if not isinstance(tile, SumTile | ProductTile):
        return None
    chains = [_chain(part) for part in tile.parts]
    is_sum = isinstance(tile, SumTile)
    weights = [float(part.factor) if is_sum else 1.0 for part in tile.parts]
    found = [
        _times_weight(chain, weight)
        for chain, weight in zip(chains, weights, strict=True)
        if chain is not None
    ]
    first, *others = sorted(found, key=len, reverse=True)
    if len(found) < len(chains) or any(len(chain) > 1 for chain in others):
        return None
    for (link,) in others:
        if is_sum:
            first = [*first, replace(link, operation="+")]
            continue
        first = _times_weight(first, link.weight)
        *before, last = first
        if last.profile == link.profile == _RBF and last.operation != "+":
            # One exponential of the inputs of both.
            first = [*before, replace(last, tiles=last.tiles + link.tiles)]
        else:
            first = [*first, replace(link, operation="*")]
    return first


def _times_weight(chain: list[_Link], weight: float) -> list[_Link]:
    """The same chain times a number."""
    return [
        link if link.operation == "*" else replace(link, weight=weight * link.weight)
        for link in chain
    ]


class _Points(NamedTuple):
    """Points as the kernel reads them: their operand (n, S), coordinates (d, n)."""

    operand: Tensor
    coordinates: Tensor

    def padded(self) -> _Points:
        """With zeros up to whole tiles."""
        extra = -len(self.operand) % _TILE
        return _Points(
            pad(self.operand, (0, 0, 0, extra)).contiguous(),
            pad(self.coordinates, (0, extra)).contiguous(),
        )


@dataclass(frozen=True)
class _Form:
    """A kernel at its points, ready for products.

    Attributes:
        parts: What is compiled for, and
        numbers: what is not: see the kernels.
        factor: What products are to be multiplied by.
        rows: Row points.
        columns: Column points, padded.
    """

    parts: tuple[int, ...]
    numbers: Tensor
    factor: float
    rows: _Points
    columns: _Points

    def launch(self, width: int) -> tuple[int, int, int]:
        """Rows of a tile, warps, and tiles of columns that are loaded ahead."""
        return _TILE, 4, 3 if self.rows.operand.shape[1] <= 64 else 2


def _two_widths(width: int) -> Split:
    """Widths of one or two products, powers of two of at least 16."""
    width = max(16, -(-width // 16) * 16)
    first = 1 << (width.bit_length() - 1)
    if first == width:
        return first, 0
    second = max(16, 1 << (width - first - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def _digit(rest: Tensor) -> Tensor:
    return rest.half().double()


def _augmented(z: Tensor, high: bool) -> tuple[Tensor, Tensor, Tensor, Split]:
    """Left and right operands (n, K), squared norms (n,), and the widths of K."""
    hi = _digit(z.double())
    lo = _digit(z.double() - hi)
    if high:
        norm = (hi * hi + 2 * hi * lo).sum(1, keepdim=True)
        left, right = [hi, hi, lo], [2 * hi, 2 * lo, 2 * hi]
    else:
        norm = (hi * hi).sum(1, keepdim=True)
        left, right = [hi], [2 * hi]
    width = sum(part.shape[1] for part in left)
    # A third digit of the norms is free where there is room for it.
    pieces = 3 if _two_widths(width + 6) == _two_widths(width + 4) else 2
    one, rest = torch.ones_like(norm), norm
    digits = []
    for _ in range(pieces):
        digits.append(_digit(rest))
        rest = rest - digits[-1]
    left += [*digits, *[one] * pieces]
    right += [*[-one] * pieces, *(-digit for digit in digits)]
    widths = _two_widths(width + 2 * pieces)
    extra = sum(widths) - width - 2 * pieces
    a, b = (pad(torch.cat(side, 1), (0, extra)).half() for side in (left, right))
    return a, b, norm[:, 0], widths


def _form(operator: TritonOperator) -> _Form | None:
    """The form of an operator's kernel, None where tiles are to do it."""
    chain = _chain(operator.tile)
    if (
        chain is None
        or len(chain) > _MOST_PARTS
        or operator.dtype != torch.float32
        or 0 in operator.shape
        or any(
            link.alpha > _LARGEST_ALPHA
            for link in chain
            if link.profile == _RATIONAL_QUADRATIC
        )
    ):
        return None
    top = sum(link.weight for link in chain if link.operation != "*")
    if not (math.isfinite(top) and top > 0):
        return None
    chain = _times_weight(chain, 1024.0 / top)
    high = operator.precision == "high"
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    coordinates: tuple[list[Tensor], list[Tensor]] = ([], [])
    parts, numbers, first, first_z = [], [], 0, 0
    for link in chain:
        z = link.scaled(operator.x, operator.origin)
        zr = z
        if not operator.is_square:
            zr = link.scaled(operator.x_rows, operator.origin)
        d = z.shape[1]
        widths, level = (0, 0), 0.0
        if d == 0:
            return None
        if d > DIRECT_DIMENSIONS:
            left, right, norms, widths = _augmented(z, high)
            if zr is not z:
                left, _, row_norms, _ = _augmented(zr, high)
                norms = torch.cat([norms, row_norms])
            largest = float(norms.max())
            if not largest <= _LARGEST_NORM[operator.precision]:
                return None
            level = -_CANCELLED * largest
            sides[0].append(left)
            sides[1].append(right)
        is_sum = int(link.operation == "+")
        parts += [is_sum, link.profile, first, *widths, first_z, d]
        numbers += [link.weight, link.alpha, level]
        coordinates[0].append(zr.T)
        coordinates[1].append(z.T)
        first, first_z = first + sum(widths), first_z + d
    if first > _WIDEST or first * max(operator.shape) >= 2**31:
        return None
    rows, columns = (
        _Points(
            torch.cat(side, 1) if side else z[0].T.half(), torch.cat(z).contiguous()
        )
        for side, z in zip(sides, coordinates, strict=True)
    )
    factor = top * float(operator.tile.factor)
    held = rows.coordinates.new_tensor(numbers)
    return _Form(tuple(parts), held, factor, rows, columns.padded())


class TritonOperator(TiledOperator):
    """K(X1, X2) reduced on tensor cores; memory O(n (d + k)).

    In float32 on a GPU, for stationary kernels of any lengthscales and active
    dimensions, scaled, and sums and products of up to three of them. Blocks, the
    diagonal and gradients come from the tiles, and so do products that the kernel has
    no form for: other dtypes and kernels, scaled inputs far from their mean.

    Args:
        kernel: A GPyTorch kernel that has a tile form.
        x: Column inputs X2 (n, d).
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes for the tiles of ``block``. Default: half of what is
            free.

    Raises:
        ImportError: Triton cannot be imported.
        ValueError: The kernel has no tile form.
    """

    name = "triton"
    precision: ClassVar[str] = "high"

    def _prepare(self) -> None:
        super()._prepare()
        _device_code()
        # In Triton's interpreter kernels run on a CPU: for tests.
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        runs = interpreted or self.device.type == "cuda"
        with torch.no_grad():
            self._form = _form(self) if runs else None
        self.sums_tiles = self._form is None
        self.is_recordable = self.is_fused and self.device.type == "cuda"

    @property
    def is_fused(self) -> bool:
        """Whether products run in the kernel, and not in tiles."""
        return self._form is not None

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        if self._form is None:
            return super()._rows_matmul(index, v)
        return self._reduced(self._form, index, self._form.columns, v)

    def _columns_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        if self._form is None:
            return super()._columns_matmul(index, v)
        operand, coordinates = self._form.columns
        columns = _Points(operand[index], coordinates[:, index]).padded()
        return self._reduced(self._form, slice(0, self.shape[0]), columns, v)

    def _reduced(
        self, form: _Form, index: RowIndex, columns: _Points, v: Tensor
    ) -> Tensor:
        rows = index_length(index)
        if 0 in (rows, *v.shape):
            return v.new_zeros(rows, v.shape[1])
        across = len(columns.operand) // _TILE
        strips = slices(rows, _TILE * max(1, _MOST_TILES // across))
        full = self.precision == "high"
        return _joined(
            [
                _joined(
                    [
                        _launched(form, columns, piece(index, strip), part, full)
                        for part in _pieces(v)
                    ],
                    1,
                )
                for strip in strips
            ],
            0,
        )


def _joined(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


class MediumTritonOperator(TritonOperator):
    """The same in half precision: errors of about 3e-4, and up to twice as fast."""

    name = "triton_medium"
    precision = "medium"


def _device_code() -> ModuleType:
    """The module that imports Triton, at its first use: few programs need it.

    Raises:
        ImportError: Triton cannot be imported.
    """
    try:
        return importlib.import_module("sgdgp.operators.triton_kernel")
    except ImportError as error:
        raise ImportError(
            "the triton operator needs triton, which comes with PyTorch for CUDA "
            f"({error})"
        ) from error


def _pieces(v: Tensor) -> Iterator[Tensor]:
    """Columns of v (n, k) in groups that one launch takes: 1, or up to 80."""
    start, most = 0, sum(_WIDTHS[-1])
    while start < v.shape[1]:
        left = v.shape[1] - start
        width = left if left <= most else _WIDTHS[-1][0]
        yield v[:, start : start + width]
        start += width


def _launched(
    form: _Form, columns: _Points, index: RowIndex, v: Tensor, full: bool
) -> Tensor:
    """K[index, columns] v (b, k) for one group of columns of v."""
    count, k = v.shape
    rows = index_length(index)
    width, rest = next(pair for pair in _WIDTHS if sum(pair) >= k)
    scale: float | Tensor = 2.0**-10 * form.factor
    hi = lo = v
    code = _device_code()
    with torch.cuda.device_of(v):
        if width > 1:
            largest = torch.linalg.vector_norm(v, math.inf, 0).clamp_min_(1e-30)
            padded = len(columns.operand)
            shape = (1 + full, padded, width + rest)
            halves = v.new_empty(shape, dtype=torch.float16)
            hi, lo = halves[0], halves[-1]
            code.digits[(padded // _TILE,)](
                v, largest, hi, lo, count, *v.stride(), FULL=full, C=k, K=width,
                REST=rest, BN=_TILE,
            )  # fmt: skip
            scale = largest * (2.0**-10 * scale)
        high, warps, stages = form.launch(width)
        tiles, blocks = len(columns.operand) // _TILE, -(-rows // high)
        splits = max(1, min(-(-_FILLED // blocks), tiles // 8), -(-tiles // _LONGEST))
        each = -(-tiles // splits)
        splits = -(-tiles // each)
        out = v.new_empty(splits, rows, width + rest)
        listed = any(form.parts[3::7])
        near = v.new_empty(
            (blocks * splits, each + 1) if listed else 1, dtype=torch.int16
        )
        first_row = index.start if isinstance(index, slice) else 0
        indices = out
        if isinstance(index, Tensor):
            # Without its strides, and checked where the device checks it.
            numbers = torch.arange(form.rows.coordinates.shape[1], device=v.device)
            indices = numbers.index_select(0, index)
        for exact in (False, True)[: 1 + listed]:
            code.product[(blocks, splits)](
                form.rows.operand, columns.operand, form.rows.coordinates,
                columns.coordinates, indices, hi, lo, out,
                form.numbers, near, first_row, rows, tiles, each,
                form.rows.coordinates.shape[1], columns.coordinates.shape[1],
                form.rows.operand.shape[1], count, v.stride(0), PARTS=form.parts,
                LAST=len(form.parts) // 7 - 1, INDEXED=indices is not out,
                LISTED=listed and not exact, EXACT=exact, FULL=full, K=width,
                REST=rest, BM=high, BN=_TILE, num_warps=warps, num_stages=stages,
            )  # fmt: skip
    total = out.sum(0) if splits > 1 else out[0]
    return total[:, :k] * scale
