"""Tables of a race, for the terminal and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from benchmarks.uci.table import format_rows

Result: TypeAlias = Mapping[str, Any]

_DASH = "-"


@dataclass(frozen=True)
class Row:
    """One contender on one problem: its results by tolerance, None where it failed."""

    solver: str
    results: Mapping[float, Result | None]

    @property
    def last(self) -> Result | None:
        """The run with the tightest tolerance there is."""
        found = [self.results[t] for t in sorted(self.results)]
        return next((result for result in found if result), None)


def text_table(
    title: str, rows: Sequence[Row], tolerances: Sequence[float], *, markdown: bool
) -> str:
    """The table of one problem.

    Three figures per tolerance: passes, wall seconds, CPU seconds. ``>`` marks a run
    that ended above the tolerance. Memory is the growth of the resident set, the
    largest over the runs; reason, and the residuals as claimed and in truth (worst
    column), are of the run with the tightest tolerance.

    Args:
        title: What stands above it.
        rows: The contenders.
        tolerances: The columns, loosest first.
        markdown: A Markdown table instead of aligned columns.
    """
    header = [
        "solver",
        *(f"{t:.0e} passes / s / CPU s".replace("e-0", "e-") for t in tolerances),
        "memory MB",
        "reason",
        "true mean",
        "true worst",
        "claimed worst",
        "remarks",
    ]
    body = [_cells(row, tolerances) for row in rows]
    if not markdown:
        return f"{title}\n{format_rows([header, *body])}"
    lines = [header, ["---", *["---:"] * (len(header) - 2), "---"], *body]
    return "\n".join([f"**{title}**", "", *(f"| {' | '.join(c)} |" for c in lines)])


def one_line(result: Result) -> str:
    """What is told of a run when it ends."""
    passes = result["passes"]
    return (
        f"{result['problem']} {result['solver']} to {result['tolerance']:g}: "
        f"{_DASH if passes is None else format(passes, '.1f')} passes, "
        f"{result['seconds']:.2f} s, true residual {_number(result, 'true', 'mean')}, "
        f"{result['reason']}{', ' if remarks(result) else ''}{remarks(result)}"
    )


def remarks(result: Result) -> str:
    """What is wrong with a run, in a few words; nothing mostly."""
    found = []
    if not result.get("finite", True):
        found.append("NaN")
    elif result.get("worse_than_start"):
        found.append("worse than start")
    if not result.get("honest", True):
        found.append("false claim")
    return ", ".join(found)


def _cells(row: Row, tolerances: Sequence[float]) -> list[str]:
    last = row.last
    results = [result for result in row.results.values() if result]
    name = row.solver
    if last is None:
        return [name, *["failed"] * len(tolerances), *[_DASH] * 6]
    used = str(last.get("solver_used") or row.solver)
    if row.solver.startswith("auto") and used != row.solver:
        name = f"{row.solver} ({used})"
    memory = [r["rss_growth_mb"] for r in results if r.get("rss_growth_mb") is not None]
    wrong = dict.fromkeys(filter(None, map(remarks, results)))
    return [
        name,
        *(_figures(row, tolerance) for tolerance in tolerances),
        f"{max(memory):.0f}" if memory else _DASH,
        str(last["reason"]),
        _number(last, "true", "mean"),
        _number(last, "true", "worst"),
        _number(last, "claimed", "worst"),
        ", ".join(wrong) or _DASH,
    ]


def _figures(row: Row, tolerance: float) -> str:
    if tolerance not in row.results:
        return _DASH  # a looser one was not reached already
    result = row.results[tolerance]
    if result is None:
        return "failed"
    if result["passes"] is None:
        return f"> {result['seconds']:.0f} s"
    text = (
        f"{result['passes']:.1f} / {result['seconds']:.2f} / "
        f"{result['cpu_seconds']:.2f}"
    )
    return text if result["reached"] else f"> {text}"


def _number(result: Result, group: str, key: str) -> str:
    value = (result.get(group) or {}).get(key)
    return _DASH if value is None else f"{value:.2e}"
