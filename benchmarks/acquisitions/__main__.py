"""The command line; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acquisitions.models import MODELS
from benchmarks.acquisitions.problems import PROBLEMS, Objective
from benchmarks.acquisitions.run import path_of
from benchmarks.acquisitions.table import read_runs, summary
from benchmarks.processes import exit_status, failures, run_module

MEASURED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Job:
    """A run that is missing."""

    function: str
    seed: int
    model: str


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.acquisitions",
        description="BoTorch's acquisitions with sgdgp's posterior and its own.",
        epilog="Runs whose results are there already are not repeated.",
    )
    add = result.add_argument
    add("--functions", nargs="+", default=list(PROBLEMS), help=", ".join(PROBLEMS))
    add("--seeds", nargs="+", type=int, default=list(range(10)))
    add("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    add("--results", type=Path, default=MEASURED, metavar="DIR")
    add("--overwrite", action="store_true", help="repeat what is there already")
    add("--table", action="store_true", help="only print the table of what is there")
    return result


def jobs(options: argparse.Namespace) -> list[Job]:
    """What has to be run, seed by seed: a part of it is a fair one.

    Raises:
        ValueError: An unknown function, or numbers that make no sense.
    """
    if options.workers < 1:
        raise ValueError(f"workers: found {options.workers}, expected at least 1")
    if min(options.seeds) < 0:
        raise ValueError(f"seeds: found {min(options.seeds)}, expected none below 0")
    for name in options.functions:
        Objective(name)
    return [
        Job(name, seed, model)
        for seed in dict.fromkeys(options.seeds)
        for name in dict.fromkeys(options.functions)
        for model in MODELS
        if options.overwrite or not path_of(options.results, name, seed, model).exists()
    ]


def execute(job: Job, folder: Path) -> int:
    """One job in a process of its own; its exit status."""
    arguments = [job.function, str(job.seed), job.model, str(folder)]
    return run_module("benchmarks.acquisitions.run", *arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table; see ``exit_status``."""
    options = parser().parse_args(arguments)

    def work() -> list[str]:
        failed: list[Job] = []
        if not options.table:
            todo = jobs(options)
            print(f"{len(todo)} runs, {options.workers} at a time", flush=True)
            failed = failures(
                todo, lambda job: execute(job, options.results), options.workers
            )
        print(summary(read_runs(options.results)))
        return [f"{job.function} {job.seed} {job.model}" for job in failed]

    return exit_status(work, "finished runs")


if __name__ == "__main__":
    sys.exit(main())
