"""Squared distances of one tile, written into a buffer.

Legend: z, z' scaled and centred inputs (a, d) and (b, d); out (a, b).

In more than three dimensions the distances come from one matrix product of
augmented inputs, |z - z'|^2 = [z, |z|^2, 1] . [-2 z', 1, |z'|^2], whose rounding
error is about machine epsilon times |z|^2: small as long as inputs are centred and
the lengthscales are not tiny beside the spread of the data. In up to three
dimensions, where lengthscales often are, the differences themselves are squared: no
cancellation, and no more time than the product takes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DIRECT_DIMENSIONS = 3
"""Up to so many dimensions distances come from differences."""


def left_form(z: Tensor) -> tuple[Tensor]:
    """What the rows of a tile need: z (n, d) itself or augmented (n, d + 2)."""
    if z.shape[1] <= DIRECT_DIMENSIONS:
        return (z,)
    squares = (z * z).sum(1, keepdim=True)
    return (torch.cat([z, squares, torch.ones_like(squares)], 1),)


def right_form(z: Tensor) -> tuple[Tensor]:
    """What the columns of a tile need: z (n, d) itself or augmented (n, d + 2)."""
    if z.shape[1] <= DIRECT_DIMENSIONS:
        return (z,)
    squares = (z * z).sum(1, keepdim=True)
    return (torch.cat([-2 * z, torch.ones_like(squares), squares], 1),)


def squared_distances(
    left: Tensor, right: Tensor, out: Tensor, scratch: Sequence[Tensor]
) -> None:
    """Write |z - z'|^2 into ``out`` (a, b); rounding may leave it slightly negative.

    Args:
        left: Rows of a left form (a, d or d + 2).
        right: Rows of a right form (b, d or d + 2).
        out: Buffer (a, b).
        scratch: One more buffer (a, b), used in two and three dimensions.
    """
    dimensions = left.shape[1]
    if dimensions > DIRECT_DIMENSIONS:
        torch.mm(left, right.T, out=out)
        return
    torch.sub(left[:, :1], right[:, 0], out=out)
    out.mul_(out)
    for i in range(1, dimensions):
        difference = torch.sub(left[:, i : i + 1], right[:, i], out=scratch[0])
        out.addcmul_(difference, difference)
