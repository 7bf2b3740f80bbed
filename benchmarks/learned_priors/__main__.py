"""The command line of the learned priors' study; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.checks import SHORT
from benchmarks.learned_priors.figures import draw
from benchmarks.learned_priors.priors import Record
from benchmarks.learned_priors.run import REGRESSIONS, RUNS, Job
from benchmarks.learned_priors.table import checks, report
from benchmarks.processes import exit_status, failures, run_module

MEASURED = Path(__file__).parent / "measured"
_SETS = {
    "regression": ("energy", "concrete", "yacht"),
    "certificates": ("energy", "concrete", "yacht"),
    "fewshot": ("angles", "classes", "fashion"),
    "continual": ("angles", "classes"),
}
_SEEDS = range(5)
_MORE_SEEDS = range(5, 20)
"""Of certificates, beside those that other rows have."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.learned_priors",
        description="Learned priors beside others; figures beside their thresholds.",
        epilog=f"Exit status {SHORT}: a figure falls short of its threshold.",
    )
    add = result.add_argument
    add("--rows", nargs="+", default=list(RUNS), choices=RUNS)
    add("--sets", nargs="+", help="of the regressions: any folder in SGDGP_DATA/uci")
    add("--seeds", nargs="+", type=int, help="default: 0 to 4, certificates 5 to 19")
    add("--table", action="store_true", help="run only what is not there yet")
    add("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    add("--plot", action="store_true", help="also draw figures into the results folder")
    add("--results", type=Path, default=MEASURED, metavar="DIR")
    return result


def jobs(options: argparse.Namespace) -> list[Job]:
    """One for each set, with all seeds that are asked for."""
    found = []
    for row in dict.fromkeys(options.rows):
        own = options.sets if row in REGRESSIONS else None
        default = _MORE_SEEDS if row == "certificates" else _SEEDS
        seeds = tuple(dict.fromkeys(options.seeds or default))
        found += [Job(row, name, seeds) for name in dict.fromkeys(own or _SETS[row])]
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, print the tables, and say by the exit status whether all figures hold."""
    options = parser().parse_args(arguments)
    asked, folder = jobs(options), options.results

    def execute(job: Job) -> int:
        seeds = map(str, job.seeds)
        module = "benchmarks.learned_priors.run"
        return run_module(module, job.row, job.name, str(folder), *seeds)

    def work() -> list[str]:
        todo = [job.missing(folder) if options.table else job for job in asked]
        failed = failures([job for job in todo if job.seeds], execute, options.workers)
        return [f"{job.row} {job.name}" for job in failed]

    status = exit_status(work, "finished seeds")
    results: dict[str, dict[str, list[Record]]] = {}
    for job in asked:
        if found := job.read(folder):
            results.setdefault(job.row, {})[job.name] = found
    if (cost := folder / "resnet50.json").exists():
        results["resnet50"] = {"batch": [json.loads(cost.read_text())]}
    print("\n" + report(results))
    if options.plot:
        for path in draw(results, folder):
            print(f"figure: {path}")
    return status or (0 if all(c.holds for c in checks(results)) else SHORT)


if __name__ == "__main__":
    sys.exit(main())
