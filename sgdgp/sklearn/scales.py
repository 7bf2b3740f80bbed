"""Where data lie and how far they spread."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def mean_and_spread(
    values: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
    """Weighted mean and standard deviation of each column.

    Args:
        values: (n, d).
        weights: How often each row counts (n,). Default: once.

    Returns:
        The means (d,), and the standard deviations (d,) with ones for constant columns.
    """
    exact = values.double()
    counts = exact.new_ones(len(exact)) if weights is None else weights.double()
    share = counts / counts.sum()
    mean = share @ exact
    spread = (share @ (exact - mean).square()).sqrt()
    # The rounding of its mean gives a constant column a spread.
    spread = torch.where(spread <= 1e-12 * mean.abs(), torch.ones_like(spread), spread)
    return mean.to(values), spread.to(values)
