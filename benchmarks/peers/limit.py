"""What this machine could do at best, measured by its own matrix products."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from sgdgp.core.threads import share

_TILES = ((256, 512), (512, 512), (256, 1024), (512, 1024))
_DEEP = 256  # columns of factors whose product is as quick as any
_REPEATS = 8  # of an operation in one timing: some milliseconds
_ROUNDS = 5


def limit(dim: int, columns: int, threads: int) -> float:
    """Seconds per entry of a symmetric K below which no product is expected.

    Of every entry on or above the diagonal: the multiplications for its distance, two
    beside the ``dim``, at the rate of a matrix product of as many or of a deep one; one
    exp2 in a tile that is in the cache; and two matrix products with ``columns``
    columns, one for either block. Each is the fastest of some tile sizes, all threads
    work on tiles of their own, and square roots, diagonals, memory and Python cost
    nothing.
    """
    distance = min(
        _seconds(partial(_products_of_depth, depth), threads, tile)
        * ((dim + 2) / depth)
        for tile in _TILES
        for depth in (dim + 2, _DEEP)
    )
    power = min(_seconds(_powers, threads, tile) for tile in _TILES)
    product = min(
        _seconds(lambda t: _products(t, columns), threads, tile) for tile in _TILES
    )
    return (distance + power) / 2 + product


def _products_of_depth(depth: int, tile: tuple[int, int]) -> Callable[[], object]:
    left, right = torch.randn(tile[0], depth), torch.randn(tile[1], depth)
    out = torch.empty(tile)
    return lambda: torch.mm(left, right.mT, out=out)


def _powers(tile: tuple[int, int]) -> Callable[[], object]:
    exponents, out = -10 * torch.rand(tile), torch.empty(tile)
    return lambda: torch.exp2(exponents, out=out)


def _products(tile: tuple[int, int], columns: int) -> Callable[[], object]:
    # A tile serves its row block and its column block: both kinds, half of each.
    entries = torch.rand(tile)
    right, left = torch.randn(columns, tile[1]), torch.randn(columns, tile[0])
    rows, below = torch.zeros(columns, tile[0]), torch.zeros(columns, tile[1])
    kinds: Iterator[int] = iter(range(1 << 30))

    def product() -> object:
        if next(kinds) % 2:
            return rows.addmm_(right, entries.mT)
        return below.addmm_(left, entries)

    return product


def _seconds(
    kind: Callable[[tuple[int, int]], Callable[[], object]],
    threads: int,
    tile: tuple[int, int],
) -> float:
    """Per entry of a tile, all threads at work on different ones."""
    operations = [kind(tile) for _ in range(threads)]

    def piece(operation: Callable[[], object]) -> Iterator[None]:
        for _ in range(_REPEATS):
            operation()
        yield

    best = float("inf")
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        share(map(piece, operations), threads)
        best = min(best, time.perf_counter() - start)
    return best / (_REPEATS * threads * tile[0] * tile[1])
