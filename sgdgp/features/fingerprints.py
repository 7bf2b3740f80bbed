"""Count fingerprints by their occupied bins, and random features of their similarity.

A fingerprint x (d,) counts fragments of a molecule: x_d >= 0, nearly all of them
zero. What is done with fingerprints here (Tanimoto kernel and features) costs as much
as they have occupied bins, and none of it has a gradient with respect to counts.

An empty fingerprint, of zeros alone, gets bin d, behind all others, for itself: then
T(0, 0) = 1 and T(0, y) = 0 need no case of their own.

Random features of the Tanimoto kernel are signs of consistent hashes. Feature m hashes
a fingerprint x to one of its occupied bins d and a level t, such that two fingerprints
get the same (d, t) with probability T(x, x'); its value is a random sign of (m, d, t)
over sqrt(M). Signs of different hashes are independent, so that
E[phi(x)^T phi(x')] = T(x, x'), with a standard error of at most 1 / sqrt(M), and
phi(x)^T phi(x) = 1 exactly (Tripp et al., NeurIPS 2023, arXiv:2306.14809).

The hash is that of consistent weighted sampling (Ioffe, ICDM 2010). For each bin, with
r, c ~ Gamma(2, 1) and b ~ U(0, 1) of its own,

    t = floor(ln x_d / r + b),    ln a = ln c - r (t - b + 1),

and d is the occupied bin with the smallest a.

Deviations. All random numbers are a function of (seed, m, d), computed when they are
needed: a map is a seed, whatever M is, and the same on every device. The sign is one of
(m, d, t) itself, where a table of t modulo 8 would let different levels collide. a is
rounded to float32 and its last bit replaced by the sign: one minimum then gives both.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import SgdgpError
from sgdgp.core.slices import check_product, check_width, slices, tracks_gradient
from sgdgp.features.base import FeatureMap, Features, Points, Values, Weights

_LARGEST_SUM = 2**24
"""Whole numbers up to here are exact in float32."""

_LARGEST_BYTE = 255
"""Whole counts up to here fit into bytes."""

_LARGEST_CODE = 2**31
"""Codes of (bin, count) below here fit into 32 bits; others are numbered anew."""

_ROWS_AT_ONCE = 1024
"""Fingerprints checked, copied or hashed at once: with 2,048 bins 8 MB in float32."""

_FEATURES_AT_ONCE = 128
"""Features hashed at once on a CPU: with ``_ROWS_AT_ONCE`` their signs are 0.5 MB and
stay in the cache."""

_GPU_FACTOR = 8
"""Times as many rows and as many features at once elsewhere: 32 MB, few launches."""

_HASHES_CPU = 2**16
"""Hashes of (bin, feature) computed at once: each of the temporaries in float64 takes
0.5 MB and stays in the cache."""

_HASHES_GPU = 2**23
"""The same elsewhere: 64 MB each, few launches."""

_GOLDEN = -0x61C8864680B583EB
"""2^64 over the golden ratio, as a signed number: the step of SplitMix64."""

_MIX_1 = -0x40A7B892E31B1A47
"""First multiplier of the SplitMix64 finaliser (Steele et al. 2014), signed."""

_MIX_2 = -0x6B2FB644ECCEEE15
"""Second multiplier of the SplitMix64 finaliser, signed."""

_HALF = 2**32
"""Number of values of half a number of 64 bits."""


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

    Bytes for whole counts up to 255, float32 for other whole counts, else x itself.
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

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bins and counts of the distinct pairs (p,), and the pair of each entry."""
        occupied = self.occupied
        one_of_each, place = _distinct(self.codes[occupied])
        bins, counts = self.bins[occupied], self.counts[occupied]
        return bins[one_of_each], counts[one_of_each], place


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


def _distinct(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Positions (p,) of one entry of each code (k,), and each entry's among them."""
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


@register_stored_class
class TanimotoFeatures(FeatureMap):
    """Signed consistent hashes of count fingerprints; a new one for every seed.

    The same fingerprint has the same features in every call, in whatever company.
    They cost as much as it has occupied bins, and a share of the random numbers of
    all bins that occur in a call: many fingerprints at once are cheaper.

    Args:
        seed: Any whole number of 64 bits.
        dim: Number of bins d.
        num_features: M.
    """

    exact = False

    def __init__(self, seed: int, dim: int, num_features: int) -> None:
        self.seed = int(seed)
        self.dim = int(dim)
        self.num_features = int(num_features)

    @torch.no_grad()
    def features(self, x: Points) -> Features:
        out = x.new_empty(x.shape[0], self.num_features)
        for rows, columns, signs in self._blocks(x):
            out[rows, columns] = signs.to(x)
        return out.mul_(self.num_features**-0.5)

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, self.num_features)
        keep = tracks_gradient(w)
        out = x.new_zeros(x.shape[0], w.shape[1])
        for rows, columns, signs in self._blocks(x):
            block = signs.to(x) @ w[columns]
            add = out.index_add if keep else out.index_add_
            out = add(0, rows, block)
        return out * self.num_features**-0.5

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        keep = tracks_gradient(v)
        out = x.new_zeros(self.num_features, v.shape[1])
        number = torch.arange(self.num_features, device=x.device)
        for rows, columns, signs in self._blocks(x):
            block = signs.to(x).mT @ v[rows]
            add = out.index_add if keep else out.index_add_
            out = add(0, number[columns], block)
        return out * self.num_features**-0.5

    def _blocks(self, x: Tensor) -> Iterator[tuple[Tensor, slice, Tensor]]:
        """Rows (numbers), features and their signs (rows, features), block by block."""
        check_width(x, self.dim)
        check_fingerprints("x", x)
        factor = 1 if x.device.type == "cpu" else _GPU_FACTOR
        sparse = sparse_counts(x)
        hashes = _PairHashes(sparse, self.seed)
        # Longest lists first: those that still have an l-th entry come first then.
        order = sparse.occupied.sum(1).argsort(descending=True)
        for columns in slices(self.num_features, factor * _FEATURES_AT_ONCE):
            table = hashes.table(columns)
            for part in slices(len(order), factor * _ROWS_AT_ONCE):
                rows = order[part]
                smallest = hashes.smallest(table, rows)
                yield rows, columns, 1 - 2 * (smallest.view(torch.int32) & 1)


class _PairHashes:
    """Hash values of every bin and count that occur in some fingerprints."""

    def __init__(self, sparse: SparseCounts, seed: int) -> None:
        occupied = sparse.occupied
        bins, counts, place = sparse.pairs()
        self._log_counts = counts.double().log()
        self._bins, self._bin_of_pair = bins.unique(return_inverse=True)
        self._seed = seed
        self._place = torch.zeros_like(sparse.codes, dtype=torch.long)
        self._place[occupied] = place
        self._lengths = occupied.sum(1)

    def table(self, columns: slice) -> Float[Tensor, "p m"]:
        """Of every pair and feature ln a in float32, its last bit a random sign."""
        pairs, width = len(self._bin_of_pair), columns.stop - columns.start
        device = self._log_counts.device
        out = torch.empty(pairs, width, dtype=torch.float32, device=device)
        size = _HASHES_CPU if device.type == "cpu" else _HASHES_GPU
        for part in slices(width, max(1, size // max(1, pairs))):
            first, last = columns.start + part.start, columns.start + part.stop
            out[:, part] = self._hashes(slice(first, last))
        return out

    def _hashes(self, columns: slice) -> Float[Tensor, "p m"]:
        """The table of few features, such that temporaries stay in the cache."""
        numbers = torch.arange(columns.start, columns.stop, device=self._bins.device)
        base = _mixed(self._bins.long() * _GOLDEN + self._seed).unsqueeze(1)
        first, second, third = (
            _mixed(base + (3 * numbers + k) * _GOLDEN) for k in range(3)
        )
        rate, log_c, shift = _gamma(first), _gamma(second).log(), _uniform(third >> 32)
        pair = self._bin_of_pair
        rate, shift = rate[pair], shift[pair]
        level = (self._log_counts.unsqueeze(1) / rate + shift).floor_()
        log_a = log_c[pair] - rate * (level - shift + 1)
        sign = _mixed(third[pair] + level.long() * _GOLDEN) & 1
        bits = log_a.float().view(torch.int32)
        return ((bits & ~1) | sign.int()).view(torch.float32)

    def smallest(
        self, table: Float[Tensor, "p m"], rows: Int[Tensor, " r"]
    ) -> Float[Tensor, "r m"]:
        """The smallest entry over the bins of each of the rows, longest lists first."""
        lengths, place = self._lengths[rows], self._place[rows].mT.contiguous()
        longest = int(lengths[0]) if len(rows) else 0
        still = (lengths > torch.arange(longest, device=rows.device)[:, None]).sum(1)
        out = table.new_full((len(rows), table.shape[1]), torch.inf)
        other = torch.empty_like(out)
        for position, count in enumerate(still.tolist()):
            part, entry = out[:count], other[:count]
            torch.index_select(table, 0, place[position, :count], out=entry)
            torch.minimum(part, entry, out=part)
        return out


def _mixed(number: Tensor) -> Tensor:
    """A random-looking number of 64 bits for each number (the SplitMix64 finaliser)."""
    number = (number ^ _shifted(number, 30)) * _MIX_1
    number = (number ^ _shifted(number, 27)) * _MIX_2
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A shift to the right that fills in zeros, which int64 does not have."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def _gamma(number: Tensor) -> Tensor:
    """Gamma(2, 1), from both halves of 64 bits."""
    return -(_uniform(number >> 32) * _uniform(number)).log()


def _uniform(number: Tensor) -> Tensor:
    """The lower 32 bits on (0, 1), in float64."""
    return ((number & (_HALF - 1)).double() + 0.5) / _HALF
