"""The command line; see README.md beside this file."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.acquisitions.models import MODELS
from benchmarks.acquisitions.problems import PROBLEMS, Objective
from benchmarks.acquisitions.run import path_of
from benchmarks.acquisitions.table import read_runs, summary

MEASURED = Path(__file__).parent / "measured"
_ROOT = Path(__file__).resolve().parents[2]
_INTERRUPTED = 130


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
    """One job in a fresh process of one thread; its exit status."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    arguments = [job.function, str(job.seed), job.model, str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.acquisitions.run", *arguments],
        env={
            "PYKEOPS_VERBOSE": "0",  # GPyTorch imports KeOps, which reports on CUDA
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(paths),
        },
        check=False,
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table.

    Returns:
        0; 1 if a run failed; 2 for arguments that do not fit; 130 after Ctrl-C.
    """
    options = parser().parse_args(arguments)
    try:
        failed = [] if options.table else _run_all(jobs(options), options)
        print(summary(read_runs(options.results)))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept", file=sys.stderr)
        return _INTERRUPTED
    for job in failed:
        print(f"failed: {job.function} {job.seed} {job.model}", file=sys.stderr)
    return 1 if failed else 0


def _run_all(todo: Sequence[Job], options: argparse.Namespace) -> list[Job]:
    """Execute the jobs, some at a time; those that failed."""
    print(f"{len(todo)} runs, {options.workers} at a time", flush=True)
    with ThreadPoolExecutor(options.workers) as pool:
        statuses = pool.map(lambda job: execute(job, options.results), todo)
        return [job for job, status in zip(todo, statuses, strict=True) if status]


if __name__ == "__main__":
    sys.exit(main())
