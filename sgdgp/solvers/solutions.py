"""Solutions of several columns taken apart, and several solves as one account."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import torch

from sgdgp.solvers.base import HistoryEntry, Reason, Solution

_WORST_LAST: tuple[Reason, ...] = (
    "converged",
    "stagnated",
    "budget",
    "interrupted",
    "diverged",
)


def continued(before: Solution, solution: Solution) -> Solution:
    """A solution whose accounts include what went before."""
    later = (
        replace(
            entry,
            passes=before.passes + entry.passes,
            seconds=before.seconds + entry.seconds,
        )
        for entry in solution.history
    )
    return replace(
        solution,
        passes=before.passes + solution.passes,
        seconds=before.seconds + solution.seconds,
        history=(*before.history, *later),
    )


def split_solution(solution: Solution, widths: Sequence[int]) -> tuple[Solution, ...]:
    """A solution for each group of so many columns; effort is that of all together."""
    if len(widths) == 1:
        return (solution,)
    parts, start = [], 0
    for width in widths:
        own = slice(start, start + width)
        parts.append(
            replace(
                solution,
                weights=solution.weights[:, own],
                residuals=solution.residuals[own],
                history=tuple(
                    HistoryEntry(
                        entry.passes, entry.seconds, entry.residuals[own], entry.exact
                    )
                    for entry in solution.history
                ),
            )
        )
        start += width
    return tuple(parts)


def merged_solution(
    solutions: Sequence[Solution], solves: Sequence[Sequence[int]]
) -> Solution:
    """One account of solutions that belong to the same posterior.

    Args:
        solutions: One for each output.
        solves: Outputs that came from the same solve, for every solve.

    Returns:
        Columns of all outputs in order; passes, seconds and warnings of all solves; the
        worst of their reasons. Outputs observed in fewer rows than others have their
        weights filled up with zeros at the end.
    """
    if len(solutions) == 1:
        return solutions[0]
    firsts = [solutions[group[0]] for group in solves]
    rows = max(solution.weights.shape[0] for solution in solutions)
    weights = [
        torch.nn.functional.pad(
            solution.weights, (0, 0, 0, rows - solution.weights.shape[0])
        )
        for solution in solutions
    ]
    return replace(
        firsts[0],
        weights=torch.cat(weights, dim=1),
        residuals=torch.cat([solution.residuals for solution in solutions]),
        passes=sum(first.passes for first in firsts),
        seconds=sum(first.seconds for first in firsts),
        reason=max((first.reason for first in firsts), key=_WORST_LAST.index),
        history=_merged_history(solutions, solves),
        warnings=tuple(
            dict.fromkeys(warning for each in solutions for warning in each.warnings)
        ),
        prediction_error=max(
            (e for each in solutions if (e := each.prediction_error) is not None),
            default=None,
        ),
    )


def _merged_history(
    solutions: Sequence[Solution], solves: Sequence[Sequence[int]]
) -> tuple[HistoryEntry, ...]:
    """One solve after another; an entry holds the residuals of its own columns."""
    passes = accumulate((solutions[group[0]].passes for group in solves), initial=0.0)
    seconds = accumulate((solutions[group[0]].seconds for group in solves), initial=0.0)
    merged = []
    for group, before, waited in zip(solves, passes, seconds, strict=False):
        for together in zip(*(solutions[i].history for i in group), strict=True):
            merged.append(
                HistoryEntry(
                    before + together[0].passes,
                    waited + together[0].seconds,
                    tuple(r for entry in together for r in entry.residuals),
                    together[0].exact,
                )
            )
    return tuple(merged)
