"""Targets with gaps: which rows of a prior were observed, in which columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Observed:
    """Targets that were observed in the same rows: one linear system.

    Attributes:
        rows: Rows of the prior (N,): the input i, or i T + t where the model has T
            outputs per input.
        targets: (N, c), without gaps.
        columns: Columns of y behind those of ``targets``; of a model with several
            outputs per input, whose targets are one column, all of them.
    """

    rows: Int[Tensor, " N"]
    targets: Float[Tensor, "N c"]
    columns: tuple[int, ...]


def observed_rows(y: Float[Tensor, "n T"], tasks: int) -> tuple[Observed, ...]:
    """The linear systems behind targets (n, T), NaN where there is none.

    Args:
        y: Targets.
        tasks: Outputs per input of the model. With several, all targets are one
            column, and what is missing is left out. With one, the columns of y are
            independent: those observed in the same rows share a system.

    Returns:
        One or more systems, in the order of their first column.

    Raises:
        ValueError: A column of independent outputs, or everything, is missing.
    """
    is_there = ~torch.isnan(y)
    if not bool(is_there.any()):
        raise ValueError("y: expected targets, found NaN in every row")
    if tasks > 1:
        rows = is_there.flatten().nonzero().squeeze(1)
        targets = y.flatten()[rows].unsqueeze(1)
        return (Observed(rows, targets, tuple(range(y.shape[1]))),)
    empty = (~is_there.any(dim=0)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(
            f"y: expected at least one observation in each column, found only NaN in "
            f"column {empty[0]}"
        )
    patterns, pattern_of = torch.unique(is_there, dim=1, return_inverse=True)
    columns: dict[int, list[int]] = {}
    for column, pattern in enumerate(pattern_of.tolist()):
        columns.setdefault(pattern, []).append(column)
    systems = []
    for pattern, chosen in columns.items():
        rows = patterns[:, pattern].nonzero().squeeze(1)
        systems.append(Observed(rows, y[rows][:, chosen], tuple(chosen)))
    return tuple(systems)
