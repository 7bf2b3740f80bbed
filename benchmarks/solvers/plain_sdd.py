"""Stochastic dual descent as one would first write it in NumPy.

The yardstick of the timings: dense updates, and distances by broadcasting, never by a
matrix product. Three ways to take the distances of a row block, from the plainest to
one that has been tuned:

- ``"broadcast"``: one (b, n, d) array of differences.
- ``"dimensions"``: the sum over dimensions of (b, n) arrays.
- ``"chunked"``: the same in place, in buffers that are kept, for as many rows at a time
  as fit the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Distances: TypeAlias = Literal["broadcast", "dimensions", "chunked"]

_CHUNK_ENTRIES = 2**17


@dataclass
class PlainSDD:
    """Algorithm 1 of Lin et al. (ICLR 2024) for (K + s I) a = y, Matern-3/2 kernel.

    Attributes:
        x: Inputs over the lengthscale (n, d).
        y: Targets (n,).
        noise: Noise variance s.
        step_size: beta, of the gradient of the dual objective.
        momentum: rho.
        averaging: r, the weight of the newest iterate.
        block_size: Coordinates per step.
        distances: How the distances of a row block are taken.
        seed: Seed of the coordinates.
    """

    x: Array
    y: Array
    noise: float
    step_size: float
    momentum: float = 0.9
    averaging: float = 0.01
    block_size: int = 512
    distances: Distances = "chunked"
    seed: int = 0
    average: Array = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.distances not in get_args(Distances):
            raise ValueError(
                f"distances: expected one of {get_args(Distances)}, found "
                f"{self.distances!r}"
            )
        self.average = np.zeros_like(self.y)
        self._weights = np.zeros_like(self.y)
        self._velocity = np.zeros_like(self.y)
        self._columns = np.ascontiguousarray(self.x.T)
        if self.distances == "chunked":
            n, size = len(self.x), min(self.block_size, len(self.x))
            height = max(1, _CHUNK_ENTRIES // n)
            self._buffer = np.empty((size, n), self.x.dtype)
            self._scratch = np.empty((height, n), self.x.dtype)
        self._random = np.random.default_rng(self.seed)

    def step(self) -> None:
        """One step on a block of coordinates drawn uniformly."""
        n = len(self.y)
        size = min(self.block_size, n)
        rows = self._random.choice(n, size, replace=False, shuffle=False)
        ahead = self._weights + self.momentum * self._velocity
        # No BLAS: its idle threads would spin on, and the CPU clock with them.
        gradient = np.einsum("bn,n->b", self.kernel_rows(rows), ahead)
        gradient += self.noise * ahead[rows] - self.y[rows]
        self._velocity *= self.momentum
        self._velocity[rows] -= self.step_size * (n / size) * gradient
        self._weights += self._velocity
        self.average *= 1.0 - self.averaging
        self.average += self.averaging * self._weights

    def kernel_rows(self, rows: npt.NDArray[np.int64]) -> Array:
        """K[rows, :] (b, n), amplitude one; good until the next call."""
        left = self.x[rows]
        if self.distances == "broadcast":
            difference = left[:, None, :] - self.x[None, :, :]
            return matern32(np.einsum("bnd,bnd->bn", difference, difference))
        if self.distances == "dimensions":
            total = np.zeros((len(rows), len(self.x)), self.x.dtype)
            for a, b in zip(left.T, self._columns, strict=True):
                total += (a[:, None] - b[None, :]) ** 2
            return matern32(total)
        out = self._buffer[: len(rows)]
        height = len(self._scratch)
        for start in range(0, len(rows), height):
            squared = out[start : start + height]
            squared[:] = 0.0
            difference = self._scratch[: len(squared)]
            for a, b in zip(left[start : start + height].T, self._columns, strict=True):
                np.subtract(a[:, None], b[None, :], out=difference)
                np.multiply(difference, difference, out=difference)
                squared += difference
            matern32(squared, difference)
        return out


def matern32(squared: Array, scratch: Array | None = None) -> Array:
    """(1 + s) exp(-s), s = sqrt(3 r^2), in place of the squared distances r^2."""
    squared *= 3.0
    scaled = np.sqrt(squared, out=squared)
    decay = np.negative(scaled, out=scratch)
    np.exp(decay, out=decay)
    scaled += 1.0
    scaled *= decay
    return scaled
