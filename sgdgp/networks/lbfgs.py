"""Limited-memory BFGS for many problems at once.

Each row is a problem of its own, with its own pairs, its own step length and its own
end; they share the evaluations, which are batched. Steps are accepted by Armijo's
condition, or, where rounding hides what values gain, by the slope at their end (Hager
and Zhang, SIAM J. Optim. 16, 2005).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

Objective: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From numbers of problems (k,) and points (k, D) to values (k,), gradients (k, D), and
norms of gradients at which a problem is solved (k,)."""

_DECREASE, _FLATTER = 1e-4, 0.9
"""Of what the slope promises, and of the slope itself: Armijo's and Wolfe's customs."""

_TRIALS, _STALLS = 20, 2
"""Lengths tried along a direction, and directions given up before a problem is."""

_ROUNDING = 16.0
"""Times the machine's epsilon and the value: what values are not known better than."""


class Pairs:
    """Steps and changes of gradients of many problems: their inverse Hessians.

    Args:
        problems: How many there are.
        size: Pairs that each keeps.
        like: In whose dtype and on whose device, (..., D).
    """

    def __init__(self, problems: int, size: int, like: Tensor) -> None:
        shape = size, problems, like.shape[-1]
        self._steps, self._changes = like.new_zeros(shape), like.new_zeros(shape)
        self._weights = like.new_zeros(shape[:2])
        self._scale = like.new_ones(problems)
        self._next = torch.zeros(problems, dtype=torch.long, device=like.device)

    def repeated(self, problems: int) -> Pairs:
        """Those of one problem as the first ones of others like it."""
        other = Pairs(0, len(self._steps), self._steps)
        for name in ("_steps", "_changes", "_weights"):
            setattr(other, name, getattr(self, name).repeat_interleave(problems, 1))
        other._scale = self._scale.repeat(problems)
        other._next = self._next.repeat(problems)
        return other

    def product(
        self, rows: Tensor, gradients: Float[Tensor, "k D"]
    ) -> Float[Tensor, "k D"]:
        """Inverse Hessians of some problems times gradients (Nocedal, 1980)."""
        size = len(self._steps)
        # Of each problem from its newest pair to its oldest.
        order = [(self._next[rows] - 1 - i) % size for i in range(size)]
        found, shares = gradients.clone(), []
        for i in order:
            share = self._weights[i, rows] * _dot(self._steps[i, rows], found)
            found -= share.unsqueeze(1) * self._changes[i, rows]
            shares.append(share)
        found *= self._scale[rows].unsqueeze(1)
        for i, first in zip(reversed(order), reversed(shares), strict=True):
            share = self._weights[i, rows] * _dot(self._changes[i, rows], found)
            found += (first - share).unsqueeze(1) * self._steps[i, rows]
        return found

    def add(
        self,
        rows: Tensor,
        steps: Float[Tensor, "k D"],
        changes: Float[Tensor, "k D"],
    ) -> None:
        """The next pair of some problems; none where the curvature is not positive."""
        curvature, squares = _dot(steps, changes), _dot(changes, changes)
        floor = torch.finfo(steps.dtype).eps * (squares * _dot(steps, steps)).sqrt()
        holds = curvature > floor
        rows, curvature, squares = rows[holds], curvature[holds], squares[holds]
        place = self._next[rows]
        self._steps[place, rows] = steps[holds]
        self._changes[place, rows] = changes[holds]
        self._weights[place, rows] = 1.0 / curvature
        self._scale[rows] = curvature / squares
        self._next[rows] = (place + 1) % len(self._steps)

    def forget(self, rows: Tensor) -> None:
        """Begin anew with some problems."""
        self._weights[:, rows] = 0.0
        self._scale[rows] = 1.0


@dataclass(frozen=True)
class Minima:
    """Where many problems have ended.

    Attributes:
        points: (k, D).
        values: (k,).
        gradients: (k, D).
        converged: Whether their gradients are small enough (k,).
        steps: Of the one that took most.
    """

    points: Float[Tensor, "k D"]
    values: Float[Tensor, " k"]
    gradients: Float[Tensor, "k D"]
    converged: Tensor
    steps: int


@torch.no_grad()
def minimise(
    objective: Objective, start: Float[Tensor, "k D"], *, steps: int, pairs: Pairs
) -> Minima:
    """Minimise all problems from their starting points.

    Args:
        objective: Values, gradients, and norms of gradients that are small enough.
        start: (k, D).
        steps: Most steps of each problem.
        pairs: What is known of their Hessians, which is added to.
    """
    every = torch.arange(len(start), device=start.device)
    points = start.clone()
    values, gradients, allowed = objective(every, points)
    converged = gradients.norm(dim=1) <= allowed
    stalls = torch.zeros_like(every)
    taken = 0
    while taken < steps:
        rows = every[~converged & (stalls < _STALLS)]
        if len(rows) == 0:
            break
        taken += 1
        g = gradients[rows]
        d = -pairs.product(rows, g)
        slope = _dot(d, g)
        wrong = ~(slope < 0)
        d[wrong], slope[wrong] = -g[wrong], -_dot(g[wrong], g[wrong])
        moved = _searched(objective, rows, points, values, d, slope)
        stalls[rows] = torch.where(moved.accepted, 0, stalls[rows] + 1)
        pairs.forget(rows[~moved.accepted])
        rows, new = rows[moved.accepted], moved.accepted
        pairs.add(
            rows,
            moved.points[new] - points[rows],
            moved.gradients[new] - gradients[rows],
        )
        points[rows], values[rows] = moved.points[new], moved.values[new]
        gradients[rows] = moved.gradients[new]
        converged[rows] = gradients[rows].norm(dim=1) <= moved.allowed[new]
    return Minima(points, values, gradients, converged, taken)


@dataclass(frozen=True)
class _Moved:
    points: Tensor
    values: Tensor
    gradients: Tensor
    allowed: Tensor
    accepted: Tensor


def _searched(
    objective: Objective,
    rows: Tensor,
    points: Tensor,
    values: Tensor,
    directions: Tensor,
    slopes: Tensor,
) -> _Moved:
    """One step of each of some problems, of lengths from one downwards."""
    start, before = points[rows], values[rows]
    found = _Moved(
        start.clone(),
        before.clone(),
        torch.zeros_like(start),
        torch.zeros_like(before),
        torch.zeros_like(rows, dtype=torch.bool),
    )
    lengths = torch.ones_like(before)
    noise = _ROUNDING * torch.finfo(before.dtype).eps * before.abs()
    for _ in range(_TRIALS):
        left = (~found.accepted).nonzero()[:, 0]
        if len(left) == 0:
            break
        t, slope = lengths[left], slopes[left]
        trial = start[left] + t.unsqueeze(1) * directions[left]
        value, gradient, allowed = objective(rows[left], trial)
        end = _dot(gradient, directions[left])
        falls = value <= before[left] + _DECREASE * t * slope
        is_flat = (value <= before[left] + noise[left]) & (
            end.abs() <= _FLATTER * slope.abs()
        )
        good = (falls | is_flat) & torch.isfinite(end)
        done = left[good]
        found.points[done], found.values[done] = trial[good], value[good]
        found.gradients[done], found.allowed[done] = gradient[good], allowed[good]
        found.accepted[done] = True
        # Where slopes change linearly this is the minimum along the direction.
        shorter = slope / (slope - end)
        shorter = torch.where(torch.isfinite(shorter), shorter, 0.1 * t)
        lengths[left] = t * shorter.clamp(0.1, 0.5)
    return found


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.vecdot(a, b)
