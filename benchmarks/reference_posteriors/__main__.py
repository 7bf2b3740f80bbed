"""The command line of the reference posteriors' study; see README.md beside this."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checks import SHORT, thresholds
from benchmarks.processes import exit_status, failures, run_module
from benchmarks.reference_posteriors.run import ROWS, records

MEASURED = Path(__file__).parent / "measured"


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.reference_posteriors",
        description="Approximate posteriors held against references.",
        epilog=f"Exit status {SHORT}: a figure falls short of its threshold.",
    )
    add = result.add_argument
    add("--rows", nargs="+", default=list(ROWS), choices=ROWS, metavar="ROW")
    add("--seeds", nargs="+", type=int, help="default: those of each row")
    add("--table", action="store_true", help="run only what is not there yet")
    add("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    add("--results", type=Path, default=MEASURED, metavar="DIR")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the table, and say by the exit status whether all figures hold."""
    options = parser().parse_args(arguments)
    asked = {n: options.seeds or ROWS[n].seeds for n in dict.fromkeys(options.rows)}
    folder = options.results

    def missing(name: str) -> list[int]:
        there = {record["seed"] for record in records(folder, name)}
        return [s for s in asked[name] if not (options.table and s in there)]

    def execute(name: str) -> int:
        module = "benchmarks.reference_posteriors.run"
        return run_module(module, name, str(folder), *map(str, missing(name)))

    def work() -> Sequence[str]:
        return failures([n for n in asked if missing(n)], execute, options.workers)

    status = exit_status(work, "finished seeds")
    checks = []
    for name, seeds in asked.items():
        found = [r for r in records(folder, name) if r["seed"] in seeds]
        checks += list(ROWS[name].checks(found)) if found else []
    print("\n" + thresholds(checks))
    return status or (0 if all(check.holds for check in checks) else SHORT)


if __name__ == "__main__":
    sys.exit(main())
