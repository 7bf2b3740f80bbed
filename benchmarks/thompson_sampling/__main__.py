"""The command line of the benchmark; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from benchmarks.processes import exit_status, failures, run_module
from benchmarks.thompson_sampling.botorch_paths import check_fits
from benchmarks.thompson_sampling.figure import draw
from benchmarks.thompson_sampling.methods import DEFAULT_METHODS, METHODS
from benchmarks.thompson_sampling.request import SETTINGS, Request
from benchmarks.thompson_sampling.store import read_result, read_results
from benchmarks.thompson_sampling.table import summary

MEASURED = Path(__file__).parent / "measured"
LENGTHSCALES = (0.1, 0.2, 0.3, 0.4, 0.5)
_SECONDS = 4.0


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.thompson_sampling",
        description="Thompson sampling with each method's functions in equal seconds.",
        epilog="Runs whose results are there already are not repeated.",
    )
    add = result.add_argument
    add("--methods", nargs="+", default=list(DEFAULT_METHODS), help=", ".join(METHODS))
    add("--lengthscales", nargs="+", type=float, default=list(LENGTHSCALES))
    add("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    add(
        "--seconds",
        type=float,
        default=_SECONDS,
        help=f"budget of the solve in every step (default: {_SECONDS:g})",
    )
    add("--kept", action="store_true", help="keep the functions from step to step")
    for field in fields(Request):
        if field.name in SETTINGS:
            add(
                f"--{field.name.replace('_', '-')}",
                type=type(field.default),
                default=field.default,
                help=f"(default: {field.default})",
            )
    add("--workers", type=int, default=2, help="processes of one thread (default: 2)")
    add("--results", type=Path, default=MEASURED, metavar="DIR")
    add("--overwrite", action="store_true", help="repeat what is there already")
    add("--table", action="store_true", help="only print the tables of what is there")
    add("--plot", action="store_true", help="also draw the figure into the results")
    return result


def requests(options: argparse.Namespace) -> list[Request]:
    """What is asked for: seed by seed, every method on a problem before the next.

    Raises:
        ValueError: An unknown method, one that does not fit into memory, or numbers
            that make no sense.
    """
    if options.workers < 1:
        raise ValueError(f"workers: found {options.workers}, expected at least 1")
    for name in options.methods:
        if name not in METHODS:
            raise ValueError(
                f"methods: found {name!r}, expected some of {', '.join(METHODS)}"
            )
    if "botorch" in options.methods:
        known = options.initial + (options.steps - 1) * options.batch
        check_fits(options.batch, known)
    settings = {name: getattr(options, name) for name in SETTINGS}
    return [
        Request(
            method, seed, lengthscale, options.seconds, kept=options.kept, **settings
        )
        for seed in dict.fromkeys(options.seeds)
        for lengthscale in dict.fromkeys(options.lengthscales)
        for method in dict.fromkeys(options.methods)
    ]


def execute(request: Request, folder: Path) -> int:
    """One run in a process of its own; its exit status."""
    text = json.dumps(request.to_dict())
    return run_module("benchmarks.thompson_sampling.run", text, str(folder))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the tables; see ``exit_status``."""
    options = parser().parse_args(arguments)

    def work() -> list[str]:
        failed = [] if options.table else _run_all(requests(options), options)
        results = read_results(options.results)
        print(summary(results))
        if options.plot:
            for path in draw(results, options.results):
                print(f"figure: {path}")
        return [request.command for request in failed]

    return exit_status(work, "finished runs")


def _run_all(wanted: Sequence[Request], options: argparse.Namespace) -> list[Request]:
    """Execute the runs without a result, some at a time; those that failed."""
    folder = options.results
    todo = [
        request
        for request in wanted
        if options.overwrite or read_result(folder, request) is None
    ]
    print(f"{len(todo)} of {len(wanted)} runs to do, {options.workers} at a time")
    folder.mkdir(parents=True, exist_ok=True)
    return failures(todo, lambda request: execute(request, folder), options.workers)


if __name__ == "__main__":
    sys.exit(main())
