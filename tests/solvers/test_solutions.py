"""What a solution says of itself."""

from __future__ import annotations

import torch

from sgdgp import Solution


def test_a_solution_says_in_a_line_how_it_went_whatever_its_columns():
    solution = Solution(
        solver="sdd",
        operator="tiled",
        weights=torch.zeros(1_000, 65),
        residuals=torch.linspace(1e-3, 0.05, 65),
        passes=1_000.25,
        seconds=12.34,
        reason="budget",
        warnings=("The solve stopped (budget).", "Residuals < 0.1 <only>."),
    )
    assert repr(solution) == (
        "Solution(weights=(1000, 65), solver='sdd', operator='tiled', passes=1000, "
        "seconds=12.3, largest_residual=0.05, warnings=2, "
        "reason='budget')"
    )
    table = solution._repr_html_()
    assert "Residuals &lt; 0.1 &lt;only&gt;." in table
    assert table.count("<tr>") == 8
