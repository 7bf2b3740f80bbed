"""What it saves to start a fit of many rows on some of them.

    python -m benchmarks.hyperparameters.first_rows --rows 4000 --json FILE

``sgdgp.fit`` above 3,000 rows makes its steps on 1,000 of them first, and then a third
as many on all. Here it takes turns with a fit that makes all steps on all rows, from
the same parameters; both are judged by the exact log marginal likelihood in float64.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import sgdgp
from benchmarks.hyperparameters.warm_starts import exact_value
from benchmarks.json_file import write_json
from benchmarks.uci.data import load_split
from benchmarks.uci.trainable import default_model

# The package has a function of that name.
_FIT = importlib.import_module("sgdgp.training.fit")


def measured(dataset: str, rows: int, steps: int) -> list[dict[str, Any]]:
    """Both fits of random rows of split 0."""
    split = load_split(dataset, 0, dtype=torch.float32)
    order = torch.randperm(len(split.x), generator=torch.Generator().manual_seed(0))
    x, y = split.x[order[:rows]], split.y[order[:rows]]
    found: list[dict[str, Any]] = []
    for start, above in (("some rows", 3_000), ("all rows", len(x))):
        model = default_model(x, y)
        began, used = time.perf_counter(), time.process_time()
        with patch.object(_FIT, "_MANY_ROWS", above):
            fitted = sgdgp.fit(model, x, y, steps=steps, progress=False)
        row: dict[str, Any] = {
            "dataset": dataset,
            "rows": len(x),
            "starts on": start,
            "seconds": time.perf_counter() - began,
            "CPU seconds": time.process_time() - used,
            "steps on all rows": fitted.steps,
            "reason": fitted.reason,
            "log p / n": exact_value(model, x, y),
        }
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        found.append(row)
    ratio = found[0]["CPU seconds"] / found[1]["CPU seconds"]
    print(f"{dataset}: ratio of CPU seconds {ratio:.2f}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--datasets", nargs="+", default=["pol", "elevators", "bike"])
    parser.add_argument("--rows", type=int, default=4000, help="of split 0")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    results: list[dict[str, Any]] = []
    given = shlex.join(sys.argv[1:] if arguments is None else arguments)
    for dataset in options.datasets:
        results += measured(dataset, options.rows, options.steps)
        if options.json:
            about = {
                "command": "python -m benchmarks.hyperparameters.first_rows " + given,
                "threads": torch.get_num_threads(),
            }
            write_json(options.json, {**about, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
