"""The command line of the UCI study; see README.md beside this file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from benchmarks.uci.arguments import parser, requests
from benchmarks.uci.data import load_split, locate
from benchmarks.uci.hyperparameters import hyperparameters_for
from benchmarks.uci.memory import LEFT_OUT
from benchmarks.uci.peers.iterative_gp import place
from benchmarks.uci.plot import plot_results
from benchmarks.uci.registry import DATASETS, NUM_SPLITS
from benchmarks.uci.request import FIT, PEERS, RunRequest
from benchmarks.uci.store import read_result
from benchmarks.uci.table import one_line, summary

_ROOT = Path(__file__).resolve().parents[2]
_INTERRUPTED = 130


def check(runs: Sequence[RunRequest]) -> None:
    """Find out before the first run what would stop a later one.

    Raises:
        ValueError: An unknown data set or split, or no hyperparameters for one.
        OSError: Files that are damaged or cannot be had.
    """
    for name in dict.fromkeys(run.dataset for run in runs):
        locate(name)
    if any(run.solver == PEERS["sklearn"] for run in runs) and not find_spec("sklearn"):
        raise ValueError("peers: sklearn is not installed: pip install scikit-learn")
    if any(run.solver == PEERS["iterative-gp"] for run in runs):
        place()
    for run in runs:
        if run.split not in range(NUM_SPLITS):
            raise ValueError(
                f"splits: found {run.split}, expected 0 to {NUM_SPLITS - 1}"
            )
        if run.hyperparameters == FIT:
            continue
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
            raise ValueError("nothing to do: no --solvers, --reference or --peers")
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
            if status == LEFT_OUT:
                continue  # it has said why
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
