"""What this machine can do: matrix products, exponentials, memory traffic.

Everything is measured at the size of one tile of the tiled operator, in float32,
and in the seconds of the clock that is handed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

TILE = (512, 1024)
"""Rows and columns of a tile on a CPU (``sgdgp.operators.tiled``)."""

CACHE_BYTES_PER_ENTRY = 56
"""Bytes that the Matern-3/2 tile reads and writes per kernel entry, one column.

Counted from its code, in operands of 4 bytes: distances by a product 1 (written),
clamp 2, rsqrt 2, root 3, exp2 2, profile 3, product with the right-hand side 1 (read).
All of them are buffers that stay in cache; from memory come only the inputs and the
right-hand side.
"""


@dataclass(frozen=True)
class Probe:
    """One measured rate of the machine.

    Attributes:
        name: What is done.
        unit: What is counted.
        run: Does it once.
        amount: Units that one call amounts to.
    """

    name: str
    unit: str
    run: Callable[[], object]
    amount: float


def probes(d: int) -> list[Probe]:
    """The rates that bound a kernel row block in d dimensions."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = TILE
    entries = rows * columns
    tile = torch.rand(rows, columns, generator=generator)
    out, other = torch.empty_like(tile), torch.empty_like(tile)
    left = torch.randn(rows, d + 2, generator=generator)
    right = torch.randn(columns, d + 2, generator=generator)
    square = torch.randn(1024, 1024, generator=generator)
    product = torch.empty_like(square)
    return [
        Probe(
            "matrix product 1024^3",
            "flop",
            lambda: torch.mm(square, square, out=product),
            2.0 * 1024**3,
        ),
        Probe(
            f"matrix product of a tile, inner {d + 2}",
            "entry",
            lambda: torch.mm(left, right.T, out=out),
            entries,
        ),
        Probe("exp2", "entry", lambda: torch.exp2(tile, out=out), entries),
        Probe("exp", "entry", lambda: torch.exp(tile, out=out), entries),
        Probe("copy in cache", "byte", lambda: other.copy_(tile), 8 * entries),
    ]


def flop_per_entry(d: int, columns: int = 1) -> int:
    """Matrix-product work of a kernel entry: its distance, its product with B."""
    return 2 * (d + 2) + 2 * columns
