"""Figures beside what is asked of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.networks.table import markdown

SHORT = 3
"""Exit status of a command of which a figure falls short of its threshold."""


@dataclass(frozen=True)
class Check:
    """One figure and its threshold."""

    what: str
    figure: str
    threshold: str
    holds: bool


def thresholds(checks: Iterable[Check]) -> str:
    """A table that says which fall short."""
    rows = [["", "figure", "asked", ""], ["---", "---:", "---:", "---"]]
    rows += [
        [c.what, c.figure, c.threshold, "" if c.holds else "falls short"]
        for c in checks
    ]
    return "**Figures and thresholds**\n\n" + markdown(rows)
