"""The options of the command line, and the runs they stand for."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from benchmarks.uci.registry import DATASETS
from benchmarks.uci.request import (
    DTYPES,
    FIT,
    PEERS,
    USUAL,
    RunRequest,
    exact_request,
)

_SOLVER_NAMES = ("auto", "sdd", "cg", "cholesky")
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


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
        description="UCI regression as in the SGD-GP papers.",
        epilog="A run whose result is in the results folder is not repeated.",
    )
    add = result.add_argument
    add(
        "--datasets", nargs="+", required=True, metavar="NAME", help=", ".join(DATASETS)
    )
    add("--splits", nargs="+", type=int, default=[0], help="0 to 9 (default: 0)")
    add("--solvers", nargs="*", choices=_SOLVER_NAMES, default=["auto"])
    add(
        "--hyperparameters",
        default="published",
        help="published, default, fit (learn them), or a file",
    )
    add("--noise-scale", type=float, help="replace the noise standard deviation")
    add("--num-samples", type=int, default=64)
    add("--dtype", choices=DTYPES, default="float32")
    add("--seed", type=int, default=0)
    add("--memory-budget", type=parse_bytes, metavar="SIZE", help="e.g. 1GB")
    add("--max-passes", type=float, help="budget in passes over the kernel matrix")
    add("--device", metavar="NAME", help="such as cuda (default: the CPU)")
    add(
        "--reference",
        choices=["exact"],
        help="also compute the float64 reference; of a fit: at what it learnt",
    )
    add("--results", type=Path, default=Path("results"), metavar="DIR")
    add("--overwrite", action="store_true", help="repeat runs that are there already")
    add("--plot", action="store_true", help="also draw figures into the results folder")
    _add_fit_options(result)
    return result


def _add_fit_options(result: argparse.ArgumentParser) -> None:
    """What counts with ``--hyperparameters fit`` only."""
    group = result.add_argument_group("with --hyperparameters fit")

    def add(name: str, kind: type, text: str, **more: Any) -> None:
        usual = USUAL[name]
        group.add_argument(
            "--" + name.replace("_", "-"),
            type=kind,
            default=usual,
            help=f"{text} (default: {usual})",
            **more,
        )

    group.add_argument("--peers", nargs="*", choices=list(PEERS), default=[])
    group.add_argument("--initialise", choices=["subsets"], help="start of the fit")
    group.add_argument(
        "--max-seconds", type=float, help="limit of each training, of peers as well"
    )
    add("fit_steps", int, "optimiser steps, of exact and cg as well")
    add("fit_passes_per_step", float, "passes over the kernel matrix")
    add("fit_learning_rate", float, "of Adam, of exact and cg as well")
    add("cg_rank", int, "of GPyTorch's preconditioner")
    add("svgp_points", int, "inducing points")
    add("svgp_epochs", int, "passes over the training data")
    add("svgp_batch", int, "rows of a minibatch")
    add("svgp_learning_rate", float, "of Adam")
    add("sklearn_rows", int, "size of the random subset")


def requests(options: argparse.Namespace) -> list[RunRequest]:
    """All runs in order.

    The exact reference of a split comes before its solvers, and its peers after.

    Raises:
        ValueError: Settings that make no sense.
    """
    runs = []
    for dataset in dict.fromkeys(options.datasets):
        for split in dict.fromkeys(options.splits):
            solves = [
                _solve_request(options, dataset, split, solver)
                for solver in dict.fromkeys([*options.solvers, "exact"])
            ]
            separate = options.reference and options.hyperparameters != FIT
            exact = [exact_request(solves[-1])] if separate else []
            peers = [
                _peer_request(options, dataset, split, peer)
                for peer in dict.fromkeys(options.peers)
            ]
            runs += exact + solves[:-1] + peers
    return runs


def _solve_request(
    options: argparse.Namespace, dataset: str, split: int, solver: str
) -> RunRequest:
    names = ["num_samples", "dtype", "seed", "memory_budget", "max_passes", "device"]
    names += ["hyperparameters", "noise_scale"]
    if options.hyperparameters == FIT:
        names += ["fit_steps", "fit_passes_per_step", "fit_learning_rate"]
        names += ["initialise", "max_seconds", "reference"]
    return RunRequest(dataset, split, solver, **_values(options, names))


_PEER_OPTIONS = {
    "exact": ["dtype", "fit_steps", "fit_learning_rate", "reference"],
    "cg": ["dtype", "seed", "fit_steps", "fit_learning_rate", "cg_rank", "reference"],
    "svgp": [
        "dtype",
        "seed",
        "svgp_points",
        "svgp_epochs",
        "svgp_batch",
        "svgp_learning_rate",
    ],
    "sklearn": ["seed", "sklearn_rows"],
    "iterative-gp": [
        "seed",
        "num_samples",
        "fit_steps",
        "fit_passes_per_step",
        "fit_learning_rate",
        "reference",
    ],
}


def _peer_request(
    options: argparse.Namespace, dataset: str, split: int, peer: str
) -> RunRequest:
    """Only what concerns the peer: other options must not repeat its run."""
    names = ["hyperparameters", "noise_scale", "max_seconds", *_PEER_OPTIONS[peer]]
    return RunRequest(dataset, split, PEERS[peer], **_values(options, names))


def _values(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    return {name: getattr(options, name) for name in names}
