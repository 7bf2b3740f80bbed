"""``python -m benchmarks.solvers.summary``: stored results as one table to choose from.

One row per contender, one column per problem; a cell is passes / seconds to the
tolerance, or the true residual where the contender did not get there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_MEASURED = Path(__file__).parent / "measured"


def summary(
    folder: Path, problems: Sequence[str], tolerance: float, columns: int
) -> str:
    """A Markdown table of the stored results.

    Args:
        folder: Where the results are.
        problems: Names such as ``pol:0``, in the order of the columns.
        tolerance: The mean relative residual that was asked for.
        columns: Right-hand sides of the runs.

    Raises:
        ValueError: There is no result for these problems and this tolerance.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if (
            result.get("tolerance") == tolerance
            and result.get("columns") == columns
            and result.get("problem") in problems
        ):
            found.setdefault(result["solver"], {})[result["problem"]] = result
    if not found:
        raise ValueError(
            f"results: {folder} has none for {', '.join(problems)} to {tolerance:g} "
            f"with {columns} columns"
        )
    rows = [["solver", *problems], ["---", *("---:" for _ in problems)]]
    rows += [
        [name, *(_cell(found[name].get(problem)) for problem in problems)]
        for name in sorted(found, key=lambda name: _order(found[name], problems))
    ]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _cell(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    if result["reached"]:
        return f"{result['passes']:.0f} / {result['seconds']:.1f}"
    if result["true"]["mean"] is None or result["true"]["mean"] > 1.0:
        return f"diverged in {result['seconds']:.0f} s"
    return f"({result['true']['mean']:.0e} in {result['seconds']:.0f} s)"


def _order(results: dict[str, dict[str, Any]], problems: Sequence[str]) -> list[Any]:
    """Who solved more comes first, then who was faster."""
    reached = [r for r in results.values() if r["reached"]]
    return [-len(reached), sum(r["seconds"] for r in reached)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.solvers.summary",
        description="Stored results of the race as one table.",
    )
    parser.add_argument("--problem", nargs="+", required=True)
    parser.add_argument("--tolerance", type=float, default=1e-2)
    parser.add_argument("--columns", type=int, default=17)
    parser.add_argument("--results", type=Path, default=_MEASURED, metavar="DIR")
    given = parser.parse_args(arguments)
    try:
        print(summary(given.results, given.problem, given.tolerance, given.columns))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
