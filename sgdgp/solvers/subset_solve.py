"""A starting point for a system that has gained a few rows: correct where they are.

With the old weights, and zero for the new rows, the residual R is large in the new
rows only. On a set S of rows, which holds them and the old rows that feel them, the
correction is exact:

    H[S, S] D = R[S],   V[S] <- V[S] + D,   R <- R - H[:, S] D.

S begins with the new rows and their most correlated old ones. It grows by the rows
whose residual is largest, until the tolerance holds in all rows: what the correction
does outside of S falls roughly exponentially in the size of S.

With directions D of an earlier solve whose images Q = H D are known (D^T H D = I), the
correction is exact on S and in the span of D, at no further product:

    (H[S, S] - Q[S] Q[S]^T) E = R[S] - Q[S] D^T R,   V <- V + E + D (D^T R - Q[S]^T E).

In terms of Gaussian processes: a regression of what the new data add, on the part of
the data that screens the rest from it (the screening effect; Stein, 2002).
"""

from __future__ import annotations

import math
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.solvers.base import Callback, Limits, Reason, Recorder, Solution
from sgdgp.solvers.costs import STORED
from sgdgp.solvers.recycling import Directions, Recycled
from sgdgp.solvers.system import (
    System,
    float64_residual,
    initial_weights,
    rounding_shows,
    true_residual,
)

_NEIGHBOURS = 10  # old rows for each new one in the first S: few, it grows as it lacks
_GROWTH = 2.0  # of S: all smaller factorisations then cost a seventh of the last
_SURPLUS = 1.08  # over the size predicted to do: a round more costs more than some rows
# Sizes of S after which how the residual falls is extrapolated. With directions known
# the alternative, conjugate gradients, is cheap: it is asked earlier.
_ROUNDS_TO_JUDGE, _ROUNDS_TO_JUDGE_WITH_KNOWN = 3, 2
_LARGEST_PART = (
    0.85  # of all rows: beyond, S is the whole system, the solver's business
)
_PART_WITH_KNOWN = 0.42  # the same with directions: the rounds cost about a pass in all
_MARGIN = 0.99  # of the tolerance: the residual is the true one, but for rounding
_REFINEMENTS = 3  # on S, each good for the digits of its factor: enough in float32
_TILE_ENTRIES = 2**22  # of the search for neighbours; bounds its memory


def solve_on_subset(
    system: System,
    old: Float[Tensor, "n k"],
    num_new: int,
    limits: Limits,
    *,
    factor_passes: float,
    memory_budget: int,
    callback: Callback | None = None,
    residual: Float[Tensor, "n k"] | None = None,
    known: Directions | None = None,
    passes: float = 0.0,
) -> Solution:
    """Corrected weights, with their true residual and what they cost.

    Args:
        system: The system over all rows (n), the new ones last.
        old: Old weights in the caller's scale, zero in the new rows (n, k).
        num_new: New rows.
        limits: Relative residual at which it is done, which must be given; budgets.
        factor_passes: Passes over K in whose time S may be factorised.
        memory_budget: Bytes that may be used.
        callback: Called after every size of S; True stops ("interrupted").
        residual: That of ``old``, in the scale of the caller (n, k). Default: a pass
            finds it.
        known: Directions whose images are known. S stays small with them: what is
            left is for conjugate gradients that know them too.
        passes: What it took to find these two.

    Returns:
        A solution; "converged", "interrupted", or "budget" where S would become too
        large or the budget is used up. The weights minimise the error in the norm of
        H over all changes of the rows S, although a residual may be larger than it
        was; after an interruption every column is the better of the two.
    """
    tolerance, most_passes = limits.tolerance, limits.max_passes
    assert tolerance is not None
    rhs = system.rhs
    record = Recorder(callback)
    first = initial_weights(system, old)
    weights = first
    if residual is None:
        base = true_residual(system, weights)
        passes += 1.0
    else:
        base = residual.double() / system.scale
    residual = base
    norms = residual.norm(dim=0)
    most = largest_block(system, memory_budget, factor_passes)
    judged = _ROUNDS_TO_JUDGE
    if known is not None:
        most = max(1, min(most, int(_PART_WITH_KNOWN * system.n)))
        judged = _ROUNDS_TO_JUDGE_WITH_KNOWN
        inner = known.directions.mT @ base.to(rhs.dtype)
    else:
        inner = rhs.new_zeros(0, rhs.shape[1])
    sizes: list[tuple[int, float]] = []
    rows = torch.empty(0, dtype=torch.long, device=rhs.device)
    reason: Reason | None = None
    while reason is None:
        scaled = partial(torch.mul, weights, system.scale)
        if record(passes, norms, exact=True, weights=scaled):
            reason = "interrupted"
        elif float(norms.max()) <= _MARGIN * tolerance:
            reason = "converged"
        elif (
            len(rows) >= most
            or _needed(sizes, tolerance, judged) > most
            or (most_passes is not None and passes + 1.0 >= most_passes)
            or record.is_past(limits.max_seconds)
        ):
            reason = "budget"
        else:
            if len(rows):
                size = min(most, _next_size(sizes, tolerance))
                rows = _grown(rows, residual, size)
            else:
                rows = _around_new_rows(system, base, num_new, most)
                passes += num_new / system.n
            change = _solved_on(system, rows, base, known, inner)
            part = len(rows) / system.n
            passes += part + part**2
            if change is None:
                weights, norms, reason = first, base.norm(dim=0), "budget"
                residual = base
                break
            weights, effect = _applied(system, rows, change, known, inner)
            weights += first
            residual = base - effect
            norms = residual.norm(dim=0)
            sizes.append((len(rows), float(norms.max())))
    if reason == "interrupted":
        better = norms < base.norm(dim=0)
        weights = torch.where(better, weights, first)
        residual = torch.where(better, residual, base)
        norms = torch.where(better, norms, base.norm(dim=0))
    if reason == "converged" and rounding_shows(system, weights, norms):
        norms = float64_residual(system, weights).norm(dim=0)
        passes += 1.0
        if float(norms.max()) > tolerance:
            reason = "budget"
    return Solution(
        solver="local",
        operator=system.operator.name,
        weights=weights * system.scale,
        residuals=norms.to(rhs.dtype),
        passes=passes,
        seconds=record.seconds,
        reason=reason,
        history=tuple(record.history),
        settings={"rows": len(rows)},
        recycled=Recycled((residual * system.scale).to(rhs.dtype), None, ()),
    )


def _next_size(sizes: list[tuple[int, float]], tolerance: float) -> int:
    """Rows of the next S: a growth, or less if less seems to be enough."""
    now = sizes[-1][0]
    size = _GROWTH * now
    needed = _SURPLUS * _needed(sizes, _MARGIN * tolerance, _ROUNDS_TO_JUDGE)
    return int(min(size, needed) if needed > now else size)


def largest_block(system: System, memory_budget: int, factor_passes: float) -> int:
    """Rows of the largest S: most of all, if time and memory allow.

    Args:
        system: The system.
        memory_budget: Bytes, of which S and its factor may take a quarter.
        factor_passes: Passes over K in whose time S may be factorised.
    """
    n, columns = system.rhs.shape
    one_pass = n * n * STORED.of_entry(columns)
    affordable = (factor_passes * one_pass / STORED.block_factor) ** (1 / 3)
    fitting = (memory_budget / (4 * 2 * system.rhs.element_size())) ** 0.5
    return max(1, int(min(_LARGEST_PART * n, affordable, fitting)))


def _needed(sizes: list[tuple[int, float]], tolerance: float, rounds: int) -> float:
    """Size of S that would do, going by how the residual fell in the last round."""
    if len(sizes) < rounds:
        return 0.0
    (size, norm), (next_size, next_norm) = sizes[-2:]
    if next_norm >= norm:
        return math.inf
    rate = math.log(norm / next_norm) / (next_size - size)
    return next_size + math.log(max(1.0, next_norm / tolerance)) / rate


def _around_new_rows(
    system: System, residual: Tensor, num_new: int, most: int
) -> Int[Tensor, " s"]:
    """The new rows (the last ones) and, for each, its most correlated old ones."""
    old = system.n - num_new
    new = torch.arange(old, system.n, device=residual.device)
    if num_new > most // 2:
        loudest = residual[old:].square().sum(1).topk(max(1, most // 2)).indices
        new = new[loudest]
    neighbours = min(_NEIGHBOURS, old, (most - len(new)) // len(new))
    if not neighbours:
        return new
    scale = system.operator.diagonal().clamp_min(torch.finfo(system.rhs.dtype).tiny)
    scale = scale[:old].rsqrt()
    found = [
        (system.operator.block(new[rows], slice(0, old)) * scale)
        .abs_()
        .topk(neighbours, dim=1, sorted=False)
        .indices.flatten()
        for rows in slices(len(new), max(1, _TILE_ENTRIES // max(1, old)))
    ]
    return torch.cat([torch.cat(found).unique(), new])


def _grown(rows: Int[Tensor, " s"], residual: Tensor, size: int) -> Int[Tensor, " t"]:
    """The rows, and those of the largest residuals, ``size`` in all."""
    score = residual.square().sum(1)
    score[rows] = -1.0
    size = max(size, len(rows) + 1)
    return torch.cat([rows, score.topk(size - len(rows)).indices])


def _solved_on(
    system: System,
    rows: Tensor,
    residual: Tensor,
    known: Directions | None,
    inner: Tensor,
) -> Tensor | None:
    """The correction E of the rows S (s, k), by Cholesky and a few refinements.

    ``inner`` is D^T R. None where even float64 finds no factor.
    """
    block = system.operator.block(rows, rows).clone()
    block.diagonal().add_(system.noise[rows, 0])
    remainder = residual[rows]
    if known is not None:
        images = known.images[rows]
        block.addmm_(images, images.mT, alpha=-1.0)
        remainder = remainder - (images @ inner).double()
    factor, info = torch.linalg.cholesky_ex(block)
    if bool(info):
        block = block.double()
        factor, info = torch.linalg.cholesky_ex(block)
    if bool(info):
        return None
    change = torch.zeros_like(remainder)
    target = remainder
    for _ in range(_REFINEMENTS):
        change += torch.cholesky_solve(remainder.to(factor.dtype), factor).double()
        remainder = target - (block @ change.to(block.dtype)).double()
    return change.to(system.rhs.dtype) if bool(torch.isfinite(change).all()) else None


def _applied(
    system: System,
    rows: Tensor,
    change: Tensor,
    known: Directions | None,
    inner: Tensor,
) -> tuple[Float[Tensor, "n k"], Float[Tensor, "n k"]]:
    """What is added to the weights, and H times it in float64."""
    step = torch.zeros_like(system.rhs).index_add_(0, rows, change)
    # In float64 from products in the system's dtype.
    effect = system.operator.columns(rows).matmul(change).double()
    effect.index_add_(0, rows, system.noise[rows].double() * change.double())
    if known is not None:
        moved = inner - known.images[rows].mT @ change
        step.addmm_(known.directions, moved)
        effect += known.images @ moved
    return step, effect
