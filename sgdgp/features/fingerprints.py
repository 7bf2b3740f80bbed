"""Count fingerprints as lists of their occupied bins.

A fingerprint x (d,) counts fragments of a molecule: x_d >= 0, nearly all of them
zero. What is done with fingerprints here (Tanimoto kernel and features) costs as much
as they have occupied bins, and none of it has a gradient with respect to counts.

An empty fingerprint, of zeros alone, gets bin d, behind all others, for itself: then
T(0, 0) = 1 and T(0, y) = 0 need no case of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from sgdgp.core.errors import SgdgpError

_LARGEST_SUM = 2**24
"""Whole numbers up to here are exact in float32."""

_LARGEST_BYTE = 255
_LARGEST_CODE = 2**31
_ROWS_AT_ONCE = 1024


class NoInputGradientError(SgdgpError, ValueError):
    """A gradient with respect to fingerprints was asked for."""


def check_fingerprints(name: str, x: Tensor) -> None:
    """Refuse what is not a fingerprint, and gradients with respect to one.

    Inputs that require a gradient are refused even where none is recorded: what is
    recomputed in a backward pass would else fail only there.

    Args:
        name: What x is to the caller.
        x: Counts (..., d).

    Raises:
        NoInputGradientError: x requires a gradient (a ValueError).
        ValueError: A count is negative, NaN or infinite.
    """
    if x.requires_grad:
        raise NoInputGradientError(
            f"{name}: the Tanimoto kernel has no gradient with respect to its inputs, "
            "which are counts; pass them without requires_grad (x.detach()), and "
            "choose among candidates, by the largest sample value or with botorch's "
            "optimize_acqf_discrete, instead of ascending a gradient"
        )
    if not x.numel():
        return
    least, most = x.aminmax()
    if not bool((least >= 0) & (most < torch.inf)):
        bad = ~((x >= 0) & (x < torch.inf))
        first = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{name}: expected counts that are finite and not negative, found "
            f"{int(bad.sum())} others, the first at index {first}: {float(x[first])}"
        )


def with_own_bin(x: Float[Tensor, "*b n d"]) -> Float[Tensor, "*b n e"]:
    """Counts (..., n, d + 1): empty fingerprints have one in the last bin."""
    empty = (x == 0).all(-1, keepdim=True)
    return torch.cat([x, empty.to(x)], -1)


def compact(name: str, x: Float[Tensor, "n d"]) -> Num[Tensor, "n d"]:
    """Checked counts in the smallest type in which they and their sums are exact.

    Args:
        name: What x is to the caller.
        x: Counts (n, d).

    Returns:
        Bytes for whole counts up to 255, float32 for other whole counts, else x.

    Raises:
        NoInputGradientError: x requires a gradient (a ValueError).
        ValueError: A count is negative, NaN or infinite.
    """
    check_fingerprints(name, x)
    if not _are_whole(x):
        return x
    return x.to(torch.uint8) if _largest(x) <= _LARGEST_BYTE else x.float()


def _are_whole(x: Tensor) -> bool:
    """Whether all counts are whole and their sums are exact in float32."""
    return all(
        bool((part == part.floor()).all() & (part.sum(-1) < _LARGEST_SUM).all())
        for part in x.split(_ROWS_AT_ONCE)
    )


def _largest(x: Tensor) -> float:
    return float(x.amax()) if x.numel() else 0.0


def totals(x: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Sums of counts, that of the own bin of empty fingerprints with them."""
    found = x.sum(1)
    return torch.where(found == 0, torch.ones_like(found), found)


def by_bins(x: Num[Tensor, "n d"]) -> Num[Tensor, "n e"]:
    """Counts (n, d + 1) as of ``with_own_bin``, bin after bin in memory."""
    n, dim = x.shape
    out = x.new_empty(dim + 1, n)
    for start in range(0, n, _ROWS_AT_ONCE):
        part = x[start : start + _ROWS_AT_ONCE]
        out[:dim, start : start + len(part)] = part.mT
        # The largest count is found much faster than whether all are zero.
        out[dim, start : start + len(part)] = part.amax(1) == 0
    return out.mT


@dataclass(frozen=True, eq=False)
class SparseCounts:
    """Occupied bins of n fingerprints, the ends of short lists filled with count 0.

    Attributes:
        bins: Occupied bins (n, l), d for the own bin of empty fingerprints.
        counts: What is in them (n, l), positive; 0 in the filling.
        codes: Equal numbers stand for the same bin with the same count (n, l).
    """

    bins: Int[Tensor, "n l"]
    counts: Num[Tensor, "n l"]
    codes: Int[Tensor, "n l"]

    @property
    def occupied(self) -> Bool[Tensor, "n l"]:
        """Where a list has an entry, and not filling."""
        return self.counts > 0


@torch.no_grad()
def sparse_counts(x: Num[Tensor, "n d"]) -> SparseCounts:
    """The lists of occupied bins of fingerprints that were checked before."""
    n, dim = x.shape
    occupied = x > 0
    lengths = occupied.sum(1)
    longest = max(1, int(lengths.max())) if n else 1
    rows, columns = occupied.nonzero(as_tuple=True)
    place = torch.arange(len(rows), device=x.device)
    place -= (lengths.cumsum(0) - lengths)[rows]
    bins = torch.zeros(n, longest, dtype=torch.int32, device=x.device)
    counts = x.new_zeros(n, longest)
    bins[rows, place] = columns.int()
    counts[rows, place] = x[rows, columns]
    empty = lengths == 0
    bins[empty, 0] = dim
    counts[empty, 0] = 1
    return SparseCounts(bins, counts, _codes(bins, counts))


def _codes(bins: Tensor, counts: Tensor) -> Tensor:
    """Numbers that are equal where bin and count are; those of filling are free."""
    if not counts.numel():
        return bins
    base = int(_largest(counts)) + 1
    whole = not counts.is_floating_point() or _are_whole(counts)
    if whole and base * (int(bins.amax()) + 1) < _LARGEST_CODE:
        return bins * base + counts.int()
    _, rank = counts.unique(return_inverse=True)
    both = bins.long() * (rank.amax() + 1) + rank
    return both.unique(return_inverse=True)[1]


def distinct(
    codes: Int[Tensor, " k"],
) -> tuple[Int[Tensor, " p"], Int[Tensor, " k"]]:
    """One entry of each code, and for every entry the number of its code there.

    Args:
        codes: Any numbers that are not negative.

    Returns:
        Positions (p,) of entries with distinct codes, and the place (k,) of each
        entry's code among them.
    """
    entry = torch.arange(len(codes), device=codes.device)
    codes = codes.long()
    # Nothing is read that was not written, so the table need not be filled first.
    size = int(codes.amax()) + 1 if len(codes) else 0
    last = torch.empty(size, dtype=torch.long, device=codes.device)
    last.scatter_(0, codes, entry)
    chosen = last.gather(0, codes)
    first = chosen == entry
    number = first.cumsum(0) - 1
    return entry[first], number[chosen]
