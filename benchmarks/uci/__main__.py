"""The command line of the UCI study; see README.md beside this file."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from benchmarks.uci.data import load_split, locate
from benchmarks.uci.hyperparameters import hyperparameters_for
from benchmarks.uci.plot import plot_results
from benchmarks.uci.registry import DATASETS, NUM_SPLITS
from benchmarks.uci.request import DTYPES, RunRequest, exact_request
from benchmarks.uci.store import read_result
from benchmarks.uci.table import one_line, summary

_SOLVER_NAMES = ("auto", "sdd", "cg", "cholesky")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_ROOT = Path(__file__).resolve().parents[2]
_INTERRUPTED = 130


def parse_bytes(text: str) -> int:
    """Bytes from ``500MB``, ``1.5GB``, ``2e9`` (decimal units).

    Raises:
        ValueError: The text is none of these.
    """
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([kmgt]?)b?", text.strip().lower())
    if match is None:
        raise ValueError(f"memory budget: found {text!r}, expected e.g. 500MB or 1GB")
    return int(float(match[1]) * _UNITS[match[2]])


def parser() -> argparse.ArgumentParser:
    """The options of ``python -m benchmarks.uci``."""
    result = argparse.ArgumentParser(
        prog="python -m benchmarks.uci",
        description="UCI regression with the hyperparameters of the SGD-GP papers.",
        epilog="A run whose result is in the results folder is not repeated.",
    )
    add = result.add_argument
    add(
        "--datasets", nargs="+", required=True, metavar="NAME", help=", ".join(DATASETS)
    )
    add("--splits", nargs="+", type=int, default=[0], help="0 to 9 (default: 0)")
    add("--solvers", nargs="*", choices=_SOLVER_NAMES, default=["auto"])
    add("--hyperparameters", default="published", help="published, default, or a file")
    add("--noise-scale", type=float, help="replace the noise standard deviation")
    add("--num-samples", type=int, default=64)
    add("--dtype", choices=DTYPES, default="float32")
    add("--seed", type=int, default=0)
    add("--memory-budget", type=parse_bytes, metavar="SIZE", help="e.g. 1GB")
    add("--max-passes", type=float, help="budget in passes over the kernel matrix")
    add("--reference", choices=["exact"], help="also compute the float64 reference")
    add("--results", type=Path, default=Path("results"), metavar="DIR")
    add("--overwrite", action="store_true", help="repeat runs that are there already")
    add("--plot", action="store_true", help="also draw figures into the results folder")
    return result


def requests(options: argparse.Namespace) -> list[RunRequest]:
    """All runs in order; the exact reference of a split comes before its solvers."""
    runs = []
    for dataset in dict.fromkeys(options.datasets):
        for split in dict.fromkeys(options.splits):
            solves = [
                RunRequest(
                    dataset,
                    split,
                    solver,
                    hyperparameters=options.hyperparameters,
                    num_samples=options.num_samples,
                    dtype=options.dtype,
                    seed=options.seed,
                    memory_budget=options.memory_budget,
                    max_passes=options.max_passes,
                    noise_scale=options.noise_scale,
                )
                for solver in dict.fromkeys([*options.solvers, "exact"])
            ]
            exact = [exact_request(solves[-1])] if options.reference else []
            runs += exact + solves[:-1]
    return runs


def check(runs: Sequence[RunRequest]) -> None:
    """Find out before the first run what would stop a later one.

    Raises:
        ValueError: An unknown data set or split, or no hyperparameters for one.
        OSError: Files that are damaged or cannot be had.
    """
    for name in dict.fromkeys(run.dataset for run in runs):
        locate(name)
    for run in runs:
        if run.split not in range(NUM_SPLITS):
            raise ValueError(
                f"splits: found {run.split}, expected 0 to {NUM_SPLITS - 1}"
            )
        info = DATASETS.get(run.dataset)
        hyperparameters_for(
            run.hyperparameters,
            run.dataset,
            run.split,
            info.d if info else load_split(run.dataset, run.split).x.shape[1],
            noise_scale=run.noise_scale,
        )


def execute(run: RunRequest, folder: Path) -> int:
    """One run in a fresh process; its exit status."""
    paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "benchmarks.uci.run"]
    return subprocess.run(
        [*command, json.dumps(run.to_dict()), str(folder)],
        env={
            "PYKEOPS_VERBOSE": "0",  # GPyTorch imports KeOps, which reports on CUDA
            **os.environ,
            "PYTHONPATH": os.pathsep.join(paths),
        },
        check=False,
    ).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is missing, then print the table.

    Returns:
        0; 1 if a run failed; 2 for arguments or data that cannot be used; 130 after
        Ctrl-C.
    """
    options = parser().parse_args(arguments)
    try:
        runs = requests(options)
        if not runs:
            raise ValueError("nothing to do: no --solvers and no --reference")
        check(runs)
        failed = _run_all(runs, options.results, overwrite=options.overwrite)
        # After a failure under --overwrite the file there is an older run's.
        stored = (
            read_result(options.results, run) for run in runs if run not in failed
        )
        results = [result for result in stored if result is not None]
        print(summary(results))
        if options.plot:
            for path in plot_results(options.results, results):
                print(f"figure: {path}")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; finished runs are kept", file=sys.stderr)
        return _INTERRUPTED
    for run in failed:
        print(f"failed: {run.command}", file=sys.stderr)
    return 1 if failed else 0


def _run_all(
    runs: Sequence[RunRequest], folder: Path, *, overwrite: bool
) -> list[RunRequest]:
    """Execute the runs that have no result yet; those that failed."""
    failed, reused = [], 0
    with tqdm(runs, unit="run", disable=None) as bar:
        for run in bar:
            bar.set_description(f"{run.dataset} {run.split} {run.solver}")
            if not overwrite and read_result(folder, run) is not None:
                reused += 1
                continue
            status = execute(run, folder)
            if status == _INTERRUPTED:
                raise KeyboardInterrupt
            result = None if status else read_result(folder, run)
            if result is None:
                failed.append(run)
            else:
                bar.write(one_line(result), file=sys.stdout)
    if reused:
        print(
            f"{reused} of {len(runs)} runs reused from {folder} (--overwrite repeats)"
        )
    return failed


if __name__ == "__main__":
    sys.exit(main())
