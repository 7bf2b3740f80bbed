"""The demo's table: posteriors side by side, against the truth and the exact one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sgdgp
from benchmarks.demo.reference import Reference
from benchmarks.demo.scores import Check, Differences, Scores

_NONE = "-"


@dataclass(frozen=True)
class Column:
    """One posterior in the table: how it was found and how good it is.

    Attributes:
        title: Head of the column.
        scores: Against the truth.
        solution: How it was solved for; None for the exact posterior.
        differences: Against the exact posterior; None where there is nothing to
            compare with.
        seconds: Wall time of everything.
    """

    title: str
    scores: Scores
    solution: sgdgp.Solution | None
    differences: Differences | None
    seconds: float


def exact_column(reference: Reference, scores: Scores) -> Column:
    """The exact posterior as a column."""
    return Column("closed form", scores, None, None, reference.seconds)


def table(columns: Sequence[Column]) -> str:
    """All columns as text, in groups of rows."""
    rows: list[list[str]] = [["", *(column.title for column in columns)]]

    def group(title: str) -> None:
        rows.append([title, *("" for _ in columns)])

    def line(title: str, cells: Sequence[str]) -> None:
        rows.append([f"  {title}", *cells])

    solutions = [column.solution for column in columns]
    group("the solve")
    line("solver", [_text(s, "solver", "cholesky") for s in solutions])
    line("operator", [_text(s, "operator", "float64") for s in solutions])
    line("passes over K", [_passes(s) for s in solutions])
    line("largest relative residual", [_residual(s) for s in solutions])
    line("seconds", [f"{column.seconds:.1f}" for column in columns])

    scores = [column.scores for column in columns]
    group("against the truth")
    for i, where in enumerate(("outside", "inside")):
        line(f"RMSE to f, {where} the gap", [f"{s.rmse[i]:.4f}" for s in scores])
        line(
            f"posterior sd, {where} the gap", [f"{s.deviation[i]:.4f}" for s in scores]
        )
        line(
            f"95 % coverage of f, {where} the gap",
            [f"{100 * s.coverage[i]:.1f} %" for s in scores],
        )
    line(
        "95 % coverage of new observations",
        [f"{100 * s.coverage_observed:.1f} %" for s in scores],
    )
    line("NLL of new observations", [f"{s.nll:.4f}" for s in scores])

    if any(column.differences for column in columns):
        group("against Cholesky, same prior")
        for title, key, form in (
            ("mean, max difference", "mean_max", ".1e"),
            ("mean, RMS difference", "mean_rms", ".1e"),
            ("mean, max in posterior sds", "mean_in_deviations", ".3f"),
            ("variance, max difference", "variance_max", ".1e"),
            ("variance, RMS difference", "variance_rms", ".1e"),
            ("variance, RMS relative", "variance_relative", ".1%"),
            ("  expected of the samples alone", "sampling_error", ".1%"),
        ):
            line(title, [_difference(c.differences, key, form) for c in columns])
    return _aligned(rows)


def check_lines(title: str, checks: Sequence[Check]) -> str:
    """One line per check, with the bounds it has to keep."""
    lines = [f"checks of {title}"]
    for check in checks:
        verdict = "ok  " if check.holds else "FAIL"
        bounds = f"[{check.low:g}, {check.high:g}]"
        lines.append(f"  {verdict} {check.name}: {check.value:.3f} in {bounds}")
    return "\n".join(lines)


def _text(solution: sgdgp.Solution | None, key: str, exact: str) -> str:
    return exact if solution is None else str(getattr(solution, key))


def _passes(solution: sgdgp.Solution | None) -> str:
    return _NONE if solution is None else f"{solution.passes:.1f}"


def _residual(solution: sgdgp.Solution | None) -> str:
    return _NONE if solution is None else f"{float(solution.residuals.max()):.1e}"


def _difference(differences: Differences | None, key: str, form: str) -> str:
    return _NONE if differences is None else format(getattr(differences, key), form)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def aligned(row: Sequence[str]) -> str:
        cells = [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
        return "  ".join([row[0].ljust(widths[0]), *cells]).rstrip()

    rule = "-" * (sum(widths) + 2 * len(widths) - 2)
    return "\n".join([aligned(rows[0]), rule, *map(aligned, rows[1:])])
