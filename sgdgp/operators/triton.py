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

Forms. a^T K b weighs tiles by (a b^T + b a^T) / 2, one more product of operands. Its
gradient by z_i is -4 sum_j G_ij (z_i - z_j), G = weights * dP / dE, and G [z, 1] comes
from one launch for each part of a kernel, or from differences where distances do. By
autograd, that is what lengthscales, inputs, and all they depend on, have theirs from.

Measured as a prototype on one H100 (triton 3.6), n = 100,000, d = 9: 15 to 60 times the
tiled operator, and faster than a product with K in memory. This module has not run on
a GPU yet: its numbers are checked in Triton's interpreter, and it compiles for sm_90.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from sgdgp.core.slices import slices
from sgdgp.kernels.compose import ProductTile, SumTile
from sgdgp.kernels.distance import DIRECT_DIMENSIONS, StationaryTile
from sgdgp.kernels.registry import (
    FactoredTile,
    TileKernel,
    differentiable_tile,
    wants_gradient,
)
from sgdgp.kernels.stationary import (
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    RationalQuadraticTile,
    RBFTile,
)
from sgdgp.operators.arguments import index_length, piece
from sgdgp.operators.base import RowIndex
from sgdgp.operators.gradients import with_gradient
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

_RBF, _RATIONAL_QUADRATIC, _MATERN12 = 0, 1, 2
_PROFILES = {
    RBFTile.profile: _RBF,
    RationalQuadraticTile.profile: _RATIONAL_QUADRATIC,
    Matern12Tile.profile: _MATERN12,
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

_WEIGHTS = 21
"""Columns of a and b that a launch multiplies: 2 x 3 x 21 are 126 of an operand."""

Split: TypeAlias = tuple[int, int]
"""Two widths, powers of two or zero, of one operand."""


@dataclass(frozen=True)
class _Link:
    """One of p = (w1 p1) o2 (w2 p2) o3 (w3 p3), taken from the left.

    Attributes:
        operation: "+" or "*"; "" of the first. What is multiplied has no weight.
        weight: w, 0-dim where it has a graph.
        profile: p, one at distance zero.
        tiles: Whose inputs it sees, side by side.
    """

    operation: str
    weight: float | Tensor
    profile: int
    tiles: tuple[StationaryTile, ...]

    @property
    def alpha(self) -> float:
        """The shape parameter, if there is one."""
        alpha = self.tiles[0].shape_parameter
        return 1.0 if alpha is None else _number(alpha)

    def scaled(self, x: Tensor, origin: Tensor) -> Tensor:
        """The inputs of the part (n, d)."""
        return torch.cat([tile.scaled(x, origin) for tile in self.tiles], 1)


def _number(value: float | Tensor) -> float:
    return float(value.detach()) if isinstance(value, Tensor) else value


def _chain(tile: TileKernel) -> list[_Link] | None:
    """tile(x, x') in links, None where it is anything else."""
    if isinstance(tile, StationaryTile):
        profile = _PROFILES.get(type(tile).profile)
        return None if profile is None else [_Link("", tile.at_zero, profile, (tile,))]
    if not isinstance(tile, SumTile | ProductTile):
        return None
    chains = [_chain(part) for part in tile.parts]
    is_sum = isinstance(tile, SumTile)
    weights = [part.factor if is_sum else 1.0 for part in tile.parts]
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


def _times_weight(chain: list[_Link], weight: float | Tensor) -> list[_Link]:
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
        factor: What its tiles are to be multiplied by.
        rows: Row points.
        columns: Column points, padded.
    """

    parts: tuple[int, ...]
    numbers: Tensor
    factor: float
    rows: _Points
    columns: _Points

    @property
    def launch(self) -> tuple[int, int, int]:
        """Rows of a tile, warps, and tiles of columns that are loaded ahead."""
        across = self.rows.operand.shape[1]
        return _TILE, 4, 3 if across <= 64 else 2 if across <= _WIDEST else 1


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


def _form(
    operator: TritonOperator, chain: list[_Link], x: Tensor, x_rows: Tensor
) -> _Form | None:
    """The form of a kernel at points of an operator, None where tiles are to do it."""
    if (
        not 0 < len(chain) <= _MOST_PARTS
        or operator.dtype != torch.float32
        or 0 in operator.shape
        or any(
            link.alpha > _LARGEST_ALPHA
            for link in chain
            if link.profile == _RATIONAL_QUADRATIC
        )
    ):
        return None
    weights = [_number(link.weight) for link in chain]
    terms = [w for w, link in zip(weights, chain, strict=True) if link.operation != "*"]
    top = sum(terms)
    if not (math.isfinite(top) and min(terms) > 0):
        return None
    high = operator.precision == "high"
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    coordinates: tuple[list[Tensor], list[Tensor]] = ([], [])
    parts, numbers, first, first_z = [], [], 0, 0
    for link, weight in zip(chain, weights, strict=True):
        z = link.scaled(x, operator.origin)
        zr = z if x_rows is x else link.scaled(x_rows, operator.origin)
        d = z.shape[1]
        widths, level = (0, 0), -1.0
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
            level = -_CANCELLED * max(largest, 1e-20)
            sides[0].append(left)
            sides[1].append(right)
        is_sum = int(link.operation == "+")
        parts += [is_sum, link.profile, first, *widths, first_z, d]
        numbers += [1024.0 / top * weight, link.alpha, level]
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
    held = rows.coordinates.new_tensor(numbers)
    return _Form(tuple(parts), held, 2.0**-10 * top, rows, columns.padded())


class TritonOperator(TiledOperator):
    """K(X1, X2) reduced on tensor cores; memory O(n (d + k)).

    In float32 on a GPU, for stationary kernels of any lengthscales and active
    dimensions, scaled, and sums and products of up to three of them. Blocks and the
    diagonal come from the tiles, and so do products and gradients that the kernel has
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
            chain = _times_weight(_chain(self.tile) or [], self.tile.factor)
            self._form = _form(self, chain, self.x, self.x_rows) if runs else None
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

    def _form_by_tiles(
        self, kernels: Sequence[FactoredTile], a: Tensor, b: Tensor, x: Tensor
    ) -> Tensor:
        """The form by the kernel, where it has one of the parameters as they are."""
        form, tile = None, differentiable_tile(self.kernel)
        some = a.shape[1] > 0 and len(x) >= self.part.size
        if self._form is not None and tile is not None and some:
            chain = _times_weight(_chain(tile) or [], tile.factor)
            with torch.no_grad():
                form = _form(self, chain, x, x)
        if form is None:
            return super()._form_by_tiles(kernels, a, b, x)
        value = x.new_zeros((), dtype=torch.float64)
        found: list[tuple[float | Tensor | None, Tensor]] = []
        own = self.part.rows(len(x))
        for q, link in enumerate(chain):
            moved, sums = _pulled(form, q, a, b, own, self.precision == "high")
            total, bent = (form.factor * sums).unbind()
            if link.operation != "*":
                value += total
                found.append((link.weight, total / _number(link.weight)))
            found.append((link.tiles[0].shape_parameter, bent * math.log(2.0)))
            z = link.scaled(x, self.origin)
            gradient = torch.zeros_like(z)
            slope = link.tiles[0].derivative_scale / link.tiles[0].at_zero
            gradient[own] = 4.0 * form.factor * slope * moved
            found.append((z, gradient))
        pairs = [(t, g.to(t)) for t, g in found if isinstance(t, Tensor)]
        pairs = [(t, g) for t, g in pairs if wants_gradient(t)]
        return with_gradient(
            value.to(a.dtype), [t for t, _ in pairs], [g for _, g in pairs]
        )

    def _reduced(
        self, form: _Form, index: RowIndex, columns: _Points, v: Tensor
    ) -> Tensor:
        rows = index_length(index)
        if 0 in (rows, *v.shape):
            return v.new_zeros(rows, v.shape[1])
        full = self.precision == "high"
        return _joined(
            [_launched(form, columns, index, part, full) for part in _pieces(v)], 1
        )


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), dim)


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
    k = v.shape[1]
    widths = next(pair for pair in _WIDTHS if sum(pair) >= k)
    if widths[0] == 1:
        factor = _Factor(v, v, v, widths)
        return form.factor * _swept(form, columns, index, factor, full)[0]
    factor, scale = _digits(v, len(columns.operand), widths, full)
    out, _ = _swept(form, columns, index, factor, full)
    return out[:, :k] * (scale * form.factor)


class _Factor(NamedTuple):
    """V (n, k) as the kernel reads it: itself, or over a scale in one or two digits."""

    values: Tensor
    hi: Tensor
    lo: Tensor
    widths: Split


def _digits(
    v: Tensor, padded: int, widths: Split, full: bool
) -> tuple[_Factor, Tensor]:
    """V (n, k) over a scale (k,) in one or two digits (padded, sum of widths)."""
    largest = torch.linalg.vector_norm(v, math.inf, 0).clamp_min_(1e-30)
    shape = (1 + full, padded, sum(widths))
    halves = v.new_empty(shape, dtype=torch.float16)
    with torch.cuda.device_of(v):
        _device_code().digits[(padded // _TILE,)](
            v, largest, halves[0], halves[-1], *v.shape[:1], *v.stride(), FULL=full,
            C=v.shape[1], K=widths[0], REST=widths[1], BN=_TILE,
        )  # fmt: skip
    return _Factor(v, halves[0], halves[-1], widths), largest * 2.0**-10


def _swept(
    form: _Form,
    columns: _Points,
    index: RowIndex,
    factor: _Factor,
    full: bool,
    pull: int = -1,
) -> tuple[Tensor, Tensor]:
    """What ``product`` writes: products (b, sum of widths), and sums (b, d + 2)."""
    tiles = len(columns.operand) // _TILE
    highest = _TILE * max(1, _MOST_TILES // tiles)
    found = [
        _swept_strip(form, columns, piece(index, strip), factor, full, pull)
        for strip in slices(index_length(index), highest)
    ]
    out, sums = zip(*found, strict=True)
    return _joined(out, 0), _joined(sums, 0)


def _swept_strip(
    form: _Form,
    columns: _Points,
    index: RowIndex,
    factor: _Factor,
    full: bool,
    pull: int,
) -> tuple[Tensor, Tensor]:
    v, hi, lo, widths = factor
    rows = index_length(index)
    links = len(form.parts) // 7 - (pull >= 0)
    high, warps, stages = form.launch
    tiles, blocks = len(columns.operand) // _TILE, -(-rows // high)
    splits = max(1, min(-(-_FILLED // blocks), tiles // 8), -(-tiles // _LONGEST))
    each = -(-tiles // splits)
    splits = -(-tiles // each)
    out = v.new_empty(splits, rows, sum(widths))
    sums = out
    if pull >= 0:
        sums = v.new_zeros(splits, rows, form.parts[7 * pull + 6] + 2)
    listed = any(form.parts[3 : 7 * links : 7])
    near = v.new_empty((blocks * splits, each + 1) if listed else 1, dtype=torch.int16)
    first_row = index.start if isinstance(index, slice) else 0
    indices = out
    if isinstance(index, Tensor):
        # Without its strides, and checked where the device checks it.
        numbers = torch.arange(form.rows.coordinates.shape[1], device=v.device)
        indices = numbers.index_select(0, index)
    with torch.cuda.device_of(v):
        for exact in (False, True)[: 1 + listed]:
            _device_code().product[(blocks, splits)](
                form.rows.operand, columns.operand, form.rows.coordinates,
                columns.coordinates, indices, hi, lo, out, sums,
                form.numbers, near, first_row, rows, tiles, each,
                form.rows.coordinates.shape[1], columns.coordinates.shape[1],
                form.rows.operand.shape[1], len(v), v.stride(0), PARTS=form.parts,
                LAST=links - 1, INDEXED=indices is not out,
                LISTED=listed and not exact, EXACT=exact, PULL=pull, FULL=full,
                K=widths[0], REST=widths[1], BM=high, BN=_TILE, num_warps=warps,
                num_stages=stages,
            )  # fmt: skip
    return (out.sum(0), sums.sum(0)) if splits > 1 else (out[0], sums[0])


@torch.no_grad()
def _pulled(
    form: _Form, q: int, a: Tensor, b: Tensor, rows: slice, full: bool
) -> tuple[Tensor, Tensor]:
    """Sums over all columns of what (a b^T + b a^T) / 2 weighs, over ``form.factor``.

    Returns:
        sum_j G_ij (z_i - z_j) (b, d) of the inputs of part q, with G weights times
        slopes; and, of all rows together, what the part has in the form, and what its
        alpha bends (2,).
    """
    profile, _, *split, start, d = form.parts[7 * q + 1 : 7 * q + 7]
    z = form.rows.coordinates[start : start + d].T
    ends = torch.cat([z, torch.ones_like(z[:, :1])], 1)
    apart = split[0] == 0
    widths = (16, 0) if apart else _two_widths(d + 1)
    factor, scale = _digits(ends, len(form.columns.operand), widths, full)
    z = z[rows]
    moved, sums = torch.zeros_like(z), z.new_zeros(2, dtype=torch.float64)
    for left, right in zip(a.split(_WEIGHTS, 1), b.split(_WEIGHTS, 1), strict=True):
        weighted, size = _weighted(form, left, right, full)
        out, found = _swept(weighted, weighted.columns, rows, factor, full, q)
        if not apart:
            out = out[:, : d + 1] * scale
            found[:, :d] += z * out[:, -1:] - out[:, :-1]
        moved += size * found[:, :d]
        sums += size * found[:, d:].sum(0, dtype=torch.float64)
    if profile == _MATERN12:
        moved *= (-form.numbers[3 * q + 2]).rsqrt()
    return moved, sums


def _weighted(form: _Form, a: Tensor, b: Tensor, full: bool) -> tuple[_Form, Tensor]:
    """The form with an operand of (a b^T + b a^T) / 2 behind its own, over a scale.

    What is left of the weights is at most one.
    """
    largest = [v.abs().amax(0).clamp_min(1e-30).double() for v in (a, b)]
    size = (largest[0] * largest[1]).sum()
    balance = 64.0 * (largest[0] * largest[1] / size).sqrt()
    a, b = ((v * (balance / m).to(v)) for v, m in zip((a, b), largest, strict=True))
    first = sum(sum(form.parts[i + 3 : i + 5]) for i in range(0, len(form.parts), 7))
    order = [(0, 0, 1), (0, 1, 0)] if full else [(0,), (0,)]
    widths = _two_widths(2 * a.shape[1] * len(order[0]))
    points = []
    for held, *pair, digits in zip(
        (form.rows, form.columns), (a, b), (b, a), order, strict=True
    ):
        v = torch.cat(pair, 1)
        both = (v.half(), (v - v.half().to(v)).half())
        side = torch.cat([both[i] for i in digits], 1)
        extra = (0, sum(widths) - side.shape[1], 0, len(held.operand) - len(side))
        operand = torch.cat([held.operand[:, :first], pad(side, extra)], 1)
        points.append(held._replace(operand=operand))
    parts = (*form.parts, 0, 0, first, *widths, 0, 0)
    rows, columns = points
    return replace(form, parts=parts, rows=rows, columns=columns), size.to(a)
