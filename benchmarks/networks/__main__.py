"""The command line of the networks' study; see README.md beside this file."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.networks.data import locate
from benchmarks.networks.figures import draw
from benchmarks.networks.laplace_baselines import import_laplace
from benchmarks.networks.methods import METHODS, NEEDS_LAPLACE, methods_for
from benchmarks.networks.settings import SETTINGS
from benchmarks.networks.store import read_result, read_results
from benchmarks.networks.table import summary
from benchmarks.processes import exit_status, failures, run_module

MEASURED = Path(__file__).parent / "measured"


@dataclass(frozen=True)
class Job:
    """What is missing of one setting and seed."""

    setting: str
    seed: int
    methods: tuple[str, ...]
    samples: int


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.networks",
        description="Uncertain networks: sgdgp beside ensembles and Laplace.",
        epilog="Methods whose results are there already are not repeated.",
    )
    add = result.add_argument
    add("--settings", nargs="+", default=["mnist", "noise", "small", "cifar"])
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add("--methods", nargs="+", default=list(METHODS), help=", ".join(METHODS))
    add("--samples", type=int, default=32, help="posterior samples (default: 32)")
    add("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    add("--results", type=Path, default=MEASURED, metavar="DIR")
    add("--overwrite", action="store_true", help="repeat what is there already")
    add("--table", action="store_true", help="only print the table of what is there")
    add("--plot", action="store_true", help="also draw figures into the results folder")
    return result


def jobs(options: argparse.Namespace) -> list[Job]:
    """What has to be run, seed by seed.

    Raises:
        ValueError: An unknown setting or method, or numbers that make no sense.
        OSError: Images are missing.
        ImportError: laplace-torch is missing and wanted.
    """
    for name, least in (("samples", 2), ("workers", 1)):
        if getattr(options, name) < least:
            raise ValueError(
                f"{name}: found {getattr(options, name)}, expected at least {least}"
            )
    found = []
    for seed in dict.fromkeys(options.seeds):
        for setting in dict.fromkeys(options.settings):
            if setting not in SETTINGS:
                raise ValueError(
                    f"settings: found {setting!r}, expected some of "
                    f"{', '.join(SETTINGS)}"
                )
            wanted = methods_for(setting, list(dict.fromkeys(options.methods)))
            kept = read_result(options.results, setting, seed)["methods"].values()
            there = set() if options.overwrite else {one["method"] for one in kept}
            missing = tuple(name for name in wanted if name not in there)
            if missing:
                found.append(Job(setting, seed, missing, options.samples))
    if any(name in NEEDS_LAPLACE for job in found for name in job.methods):
        import_laplace()
    sources = {f"{SETTINGS[job.setting].source}.npz" for job in found}
    for file in sorted(sources | ({"fashion_mnist_part.npz"} if found else set())):
        locate(file)
    return found


def execute(job: Job, folder: Path) -> int:
    """One job in a process of its own; its exit status."""
    arguments = [job.setting, str(job.seed), str(job.samples), str(folder)]
    return run_module("benchmarks.networks.run", *arguments, *job.methods)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table; see ``exit_status``."""
    options = parser().parse_args(arguments)

    def work() -> list[str]:
        failed: list[Job] = []
        if not options.table:
            todo = jobs(options)
            print(f"{len(todo)} settings and seeds to run, {options.workers} at a time")
            failed = failures(
                todo, lambda job: execute(job, options.results), options.workers
            )
        results = read_results(options.results)
        print(summary(results))
        if options.plot:
            for path in draw(results, options.results):
                print(f"figure: {path}")
        return [f"{job.setting} {job.seed}" for job in failed]

    return exit_status(work, "finished methods")


if __name__ == "__main__":
    sys.exit(main())
