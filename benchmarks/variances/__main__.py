"""Errors and costs of posterior variances against a float64 Cholesky factor.

    python -m benchmarks.variances                      # Matern-3/2, uniform inputs
    python -m benchmarks.variances --uci elevators pol  # split 0, published parameters

Both print a table; ``--json FILE`` keeps it. "functions" are the plain variances of 64
sample functions, "default" what ``posterior.variance`` returns; errors are relative.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import sgdgp
from benchmarks.json_file import write_json
from benchmarks.uci.data import load_split
from benchmarks.uci.exact import exact_prediction
from benchmarks.uci.hyperparameters import Hyperparameters, hyperparameters_for
from benchmarks.uci.model import build_model
from sgdgp.posterior import Posterior

_CASES = [
    (2, 0.3, 0.01),
    (4, 0.5, 0.1),
    (8, 1.0, 0.01),
    (8, 3.0, 0.01),
    (16, 2.0, 0.1),
    (16, 6.0, 0.1),
]
"""Inputs, lengthscale, noise variance."""

Row = dict[str, float | str]


def uniform(dim: int, lengthscale: float, noise: float, features: int) -> Row:
    """4,000 points in the unit cube; 300 others are predicted."""
    generator = torch.Generator().manual_seed(0)
    x, at = (
        torch.rand(m, dim, generator=generator, dtype=torch.float64)
        for m in (4_000, 300)
    )
    values = Hyperparameters(noise**0.5, 1.0, (lengthscale,) * dim)
    model = build_model(x, torch.sin(3 * x.sum(1)), values)
    covariance = model.covar_module(x).to_dense()
    covariance.diagonal().add_(noise)
    cross = model.covar_module(x, at).to_dense()
    factor = torch.linalg.cholesky(covariance)
    half = torch.linalg.solve_triangular(factor, cross, upper=False)
    posterior = sgdgp.condition(model, num_features=features, progress=False)
    name = f"d={dim} l={lengthscale} noise={noise} features={features}"
    return {"case": name, **measured(posterior, at, 1 - half.square().sum(0))}


def published(name: str) -> Row:
    """Split 0 of a UCI set in float32, with the negative log likelihoods."""
    split = load_split(name, 0)
    values = hyperparameters_for("published", name, 0, split.x.shape[1])
    noise = values.noise_scale**2
    exact = exact_prediction(split, values)
    model = build_model(split.x.float(), split.y.float(), values)
    posterior = sgdgp.condition(model, progress=False)
    at = split.x_test.float()
    row: Row = {"case": name, **measured(posterior, at, exact.variance - noise)}
    found = posterior.predict(at, batch_size=1_024, progress=False)
    for key, mean, variance in (
        ("nll exact", exact.mean, exact.variance),
        ("nll default", found.mean.double(), found.variance.double() + noise),
    ):
        loss = (split.y_test - mean).square() / variance + variance.log()
        row[key] = float(0.5 * (loss.mean() + torch.log(torch.tensor(2 * torch.pi))))
    return row


def measured(posterior: Posterior, at: Tensor, truth: Tensor) -> Row:
    """Errors, coverage of two standard errors, and seconds."""
    start = time.perf_counter()
    posterior.variance(at[:1])
    first = time.perf_counter() - start
    start = time.perf_counter()
    default, error = posterior.variance(at, return_error=True)
    default_seconds = time.perf_counter() - start
    start = time.perf_counter()
    plain = posterior.variance(at, from_samples=True)
    plain_seconds = time.perf_counter() - start
    off = default.double() / truth - 1
    return {
        "functions": float((plain.double() / truth - 1).square().mean().sqrt()),
        "default": float(off.square().mean().sqrt()),
        "default, mean absolute": float(off.abs().mean()),
        "covered": float((off.abs() <= 2 * error / truth).double().mean()),
        "seconds of the first call": first,
        "ratio of seconds": default_seconds / plain_seconds,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--uci", nargs="*", metavar="NAME", help="UCI sets instead")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with torch.no_grad():
        if options.uci:
            rows = [published(name) for name in options.uci]
        else:
            rows = [uniform(*case, 16_384) for case in _CASES]
            rows += [uniform(*case, 512) for case in _CASES[::2]]
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.4f}" if isinstance(value, float) else value.ljust(40)
                for key, value in row.items()
            )
        )
    if options.json:
        given = sys.argv[1:] if arguments is None else arguments
        command = "python -m benchmarks.variances " + shlex.join(given)
        write_json(options.json, {"command": command, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
