"""The Tanimoto kernel of count fingerprints as a GPyTorch kernel."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.features.dispatch import FeatureRequest, register_features
from sgdgp.features.fingerprints import (
    TanimotoFeatures,
    check_fingerprints,
    with_own_bin,
)
from sgdgp.kernels.registry import Forms, TileKernel, register_tile_kernel
from sgdgp.kernels.tanimoto_tiles import TanimotoTile
from sgdgp.kernels.tile_gradients import (
    Gradient,
    LiveTile,
    Pad,
    Term,
    register_tile_gradient,
)

_TILE_ENTRIES = 2**19


class TanimotoKernel(Kernel):
    """T(x, x') = sum_d min(x_d, x'_d) / sum_d max(x_d, x'_d) for counts x_d >= 0.

    The similarity of two molecules by their count fingerprints (Ralaivola et al.,
    Neural Networks 2005): 1 for the same fingerprint, 0 for no fragment in common, and
    T(0, 0) = 1. Counts need not be whole; on zeros and ones T is the Jaccard index.

    There are no parameters: put it into a ``ScaleKernel`` for an amplitude, as is
    usual for GPyTorch kernels. Inputs have no gradient, and one that is asked for is
    refused. Entries cost as much as the fingerprints have occupied bins.

    Args:
        active_dims: Columns of the inputs that hold the fingerprint. Default: all.
        batch_shape: Batch shape of the kernel; it only shapes the result.

    Example:
        >>> kernel = ScaleKernel(TanimotoKernel())
        >>> kernel(torch.tensor([[2.0, 0.0, 1.0], [1.0, 1.0, 0.0]])).to_dense()
    """

    is_stationary = False
    has_lengthscale = False

    def __init__(
        self,
        *,
        active_dims: tuple[int, ...] | None = None,
        batch_shape: torch.Size | None = None,
    ) -> None:
        super().__init__(active_dims=active_dims, batch_shape=batch_shape)

    def forward(
        self,
        x1: Tensor,
        x2: Tensor,
        diag: bool = False,
        last_dim_is_batch: bool = False,
        **params: Any,
    ) -> Tensor:
        """T (..., n, m), or its diagonal (..., n).

        Args:
            x1: Counts (..., n, d).
            x2: Counts (..., m, d).
            diag: Only T(x1_i, x2_i).
            last_dim_is_batch: Not supported.
            **params: Ignored.

        Raises:
            NoInputGradientError: An input requires a gradient.
            ValueError: A count is negative, NaN or infinite, or each column is to be
                a batch element.
        """
        if last_dim_is_batch:
            raise ValueError(
                "last_dim_is_batch: a fingerprint is compared as a whole, not column "
                "by column"
            )
        for name, x in (("x1", x1), ("x2", x2)):
            check_fingerprints(name, x)
        with torch.no_grad():
            if diag:
                found = _of_pairs(with_own_bin(x1), with_own_bin(x2))
            elif x1.ndim == x2.ndim == 2:
                found = _by_tiles(x1, x2)
            else:
                found = _by_distances(with_own_bin(x1), with_own_bin(x2))
        kept = 1 if diag else 2
        batch = torch.broadcast_shapes(self.batch_shape, found.shape[:-kept])
        return found.expand(*batch, *found.shape[-kept:])


def _of_pairs(x1: Tensor, x2: Tensor) -> Tensor:
    return torch.minimum(x1, x2).sum(-1) / torch.maximum(x1, x2).sum(-1)


def _by_tiles(x1: Tensor, x2: Tensor) -> Tensor:
    tile = TanimotoTile(1.0, None)
    origin = x1.new_zeros(x1.shape[1])
    left, right = tile.left(x1, origin), tile.right(x2, origin)
    out = x1.new_empty(len(x1), len(x2))
    for rows in slices(len(x1), max(1, _TILE_ENTRIES // max(1, len(x2)))):
        part = out[rows]
        cut = tuple(form[rows] for form in left)
        tile.tile(cut, right, part, (torch.empty_like(part),))
    return out


def _by_distances(x1: Tensor, x2: Tensor) -> Tensor:
    """From |x - y|_1 = |x|_1 + |y|_1 - 2 sum min: takes batches, costs all bins."""
    both = x1.sum(-1).unsqueeze(-1) + x2.sum(-1).unsqueeze(-2)
    apart = torch.cdist(x1, x2, p=1.0)
    return (both - apart).clamp_min(0) / (both + apart)


@register_tile_kernel(TanimotoKernel)
def _(kernel: TanimotoKernel, dims: Tensor | None) -> TileKernel:
    return TanimotoTile(1.0, dims)


class _TanimotoTerm(Term):
    """Tiles whose only gradient is that of the factor in front of them."""

    buffers = 2
    wants_gradient = False

    def __init__(self, tile: TanimotoTile, left: Forms, right: Forms) -> None:
        self._tile, self._left, self._right = tile, left, right

    def evaluate(self, rows: slice, columns: slice, pad: Pad) -> Tensor:
        value = pad.take()
        left = tuple(form[rows] for form in self._left)
        right = tuple(form[columns] for form in self._right)
        self._tile.tile(left, right, value, (pad.take(),))
        return value

    def pull(self, weight: Tensor, pad: Pad) -> None:
        """Nothing to pull."""

    def gradients(self, outer: float) -> Iterator[Gradient]:
        return iter(())


@dataclass(frozen=True)
class _LiveTanimoto(LiveTile):
    """The kernel in a quadratic form that is differentiated.

    Attributes:
        dims: Columns of the inputs that the kernel sees, or None for all.
    """

    dims: Tensor | None

    def bind(self, x: Tensor, origin: Tensor) -> Term:
        tile = TanimotoTile(1.0, self.dims)
        return _TanimotoTerm(tile, tile.left(x, origin), tile.right(x, origin))


@register_tile_gradient(TanimotoKernel)
def _(kernel: TanimotoKernel, dims: Tensor | None) -> LiveTile:
    return _LiveTanimoto(1.0, dims)


@register_features(TanimotoKernel)
def tanimoto_features(
    kernel: TanimotoKernel, request: FeatureRequest
) -> TanimotoFeatures:
    """Signed hashes: see :class:`sgdgp.features.fingerprints.TanimotoFeatures`."""
    seed = torch.randint(
        2**62, (), generator=request.generator, device=request.generator.device
    )
    return TanimotoFeatures(int(seed), request.dim, request.num_features)
