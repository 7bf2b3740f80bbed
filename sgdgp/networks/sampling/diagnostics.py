"""Whether chains have mixed, and how many independent draws theirs are worth.

Rank-normalised split R-hat and effective sample sizes, as in Vehtari et al.,
"Rank-normalization, folding, and localization: an improved R-hat for assessing
convergence of MCMC", Bayesian Analysis 16, 2021. Draws are (chains, draws, ...): every
entry of the trailing axes is a quantity of its own, some at a time in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

_NUMBERS = 2**21
"""Draws that are ranked together: a dozen temporaries of 16 MiB."""

_LEAST = 4  # draws of a chain: halves of fewer have no variance

_TAILS = (0.05, 0.95)


def split_r_hat(draws: Float[Tensor, "c n *rest"]) -> Float[Tensor, "*rest"]:
    """The larger of the split R-hats of ranks and of folded ranks; 1 when mixed.

    Above 1.01 the paper calls chains not mixed; a fixed threshold for thousands of
    quantities must be laxer. NaN where nothing ever moved, and where a draw is NaN.

    Args:
        draws: At least four draws of each chain; one chain is compared with itself.

    Raises:
        ValueError: Fewer draws.
    """

    def larger(x: Tensor) -> Tensor:
        centre = x.flatten(1).quantile(0.5, dim=1)
        folded = (x - centre[:, None, None]).abs()
        bulk, tail = (_r_hat(_normalised(part)) for part in (x, folded))
        return torch.fmax(bulk, tail)

    return _by_quantity(draws, larger)


def bulk_ess(draws: Float[Tensor, "c n *rest"]) -> Float[Tensor, "*rest"]:
    """Effective sample size of the ranks: what means and medians rest on.

    Args:
        draws: At least four draws of each chain.

    Raises:
        ValueError: Fewer draws.
    """
    return _by_quantity(draws, lambda x: _ess(_normalised(x)))


def tail_ess(draws: Float[Tensor, "c n *rest"]) -> Float[Tensor, "*rest"]:
    """The smaller effective sample size of the 5 % and 95 % quantiles.

    Args:
        draws: At least four draws of each chain.

    Raises:
        ValueError: Fewer draws.
    """

    def smaller(x: Tensor) -> Tensor:
        levels = x.new_tensor(_TAILS)
        low, high = x.flatten(1).quantile(levels, dim=1)[:, :, None, None]
        return torch.minimum(_ess((x <= low).to(x)), _ess((x <= high).to(x)))

    return _by_quantity(draws, smaller)


@torch.no_grad()
def _by_quantity(draws: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Values of a function of half chains (q, 2 c, n // 2), some quantities at once."""
    if draws.ndim < 2 or draws.shape[0] < 1 or draws.shape[1] < _LEAST:
        raise ValueError(
            f"draws: expected (chains, draws, ...) with at least {_LEAST} draws, found "
            f"shape {tuple(draws.shape)}"
        )
    chains, count, *rest = draws.shape
    flat, half = draws.reshape(chains, count, -1), count // 2
    found = [flat.new_empty(0, dtype=torch.float64)]
    for some in flat.split(max(1, _NUMBERS // (chains * count)), dim=2):
        # Of an odd number the middle one is left out.
        halves = torch.cat([some[:, :half], some[:, count - half :]]).double()
        value = function(halves.permute(2, 0, 1).contiguous())
        # NaN has no rank.
        found.append(value.masked_fill(some.isnan().any(0).any(0), math.nan))
    return torch.cat(found).reshape(rest)


def _normalised(x: Float[Tensor, "q c n"]) -> Float[Tensor, "q c n"]:
    """Normal scores of the ranks among all draws, ties in the middle of theirs."""
    flat = x.flatten(1)
    ordered = flat.sort(dim=1).values
    below = torch.searchsorted(ordered, flat, right=False)
    upto = torch.searchsorted(ordered, flat, right=True)
    ranks = (below + upto + 1).to(x) / 2
    scores = torch.special.ndtri((ranks - 0.375) / (flat.shape[1] + 0.25))
    return scores.view_as(x)


def _r_hat(x: Float[Tensor, "q c n"]) -> Float[Tensor, " q"]:
    within = x.var(2).mean(1)
    between = x.mean(2).var(1)
    count = x.shape[2]
    return ((count - 1) / count + between / within).sqrt()


def _ess(x: Float[Tensor, "q c n"]) -> Float[Tensor, " q"]:
    """Effective sample size by Geyer's initial monotone sequence."""
    _, chains, count = x.shape
    total = chains * count
    centred = x - x.mean(2, keepdim=True)
    spectrum = torch.fft.rfft(centred, n=2 * count, dim=2)
    covariance = torch.fft.irfft(spectrum * spectrum.conj(), dim=2)[..., :count] / count
    covariance = covariance.mean(1)
    within = covariance[:, :1] * count / (count - 1)
    variance = covariance[:, :1] + x.mean(2).var(1).unsqueeze(1)
    rho = 1 - (within - covariance) / variance
    rho[:, 0] = 1.0
    # Sums of two neighbours are positive and fall, in theory: they are cut where noise
    # makes them negative, at the last at the latest, and kept from rising before that.
    pairs = rho[:, : max(2, (count - 1) // 2 * 2)].unflatten(1, (-1, 2))
    sums = pairs.sum(2)
    sums[:, -1] = 0.0
    number = (sums > 0).to(torch.int8).cummin(1).values.sum(1, keepdim=True)
    sums = torch.where(sums > 0, sums, 0.0).cummin(1).values.sum(1)
    # Of the pair where it is cut the first counts once, if it is positive.
    rest = pairs[..., 0].gather(1, number)[:, 0].clamp_min(0.0)
    time = (2 * sums + rest - 1).clamp_min(1 / math.log10(total))
    # What never moved is known as well as by independent draws.
    return torch.where(variance[:, 0] > 0, total / time, float(total))
