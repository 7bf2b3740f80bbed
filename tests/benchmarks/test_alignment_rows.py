"""The rows of alignment in the study of reference posteriors."""

from __future__ import annotations

import pytest
import torch

from benchmarks.reference_posteriors.alignment import (
    check_barriers,
    check_transpositions,
    dense,
    exchanged_by,
    group_of,
    permutation,
)


@pytest.mark.parametrize("transpositions", [0, 1, 5, 11])
def test_a_permutation_of_so_many_transpositions(transpositions: int):
    generator = torch.Generator().manual_seed(0)
    order = permutation(12, transpositions, generator)
    assert sorted(order) == list(range(12))
    member = exchanged_by(group_of(dense(12)), order)
    assert int(member.total_transpositions) == transpositions


def test_figures_that_fall_short_are_seen():
    barriers = {"raw": [0.4, 0.6], "weights": [0.01, 0.01], "activations": [0.2, 0.2]}
    names = "1 x 32", "1 x 128", "2 x 32", "residual CNN, 16 channels"
    held = [c.holds for c in check_barriers([dict.fromkeys(names, barriers)])]
    assert held == [True, False] * 4
    pair = {"barrier_undone": 0.0, "barrier_matched": 0.1}
    pairs = [
        {"transpositions": i, "after": 9 - i, "barrier": float(i), **pair}
        for i in range(4)
    ]
    held = [c.holds for c in check_transpositions([{"pairs": pairs}])]
    assert held == [False, True, True, True]
