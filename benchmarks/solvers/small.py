"""Seconds of small problems beside GPyTorch: condition, then predict at 100 points.

    OMP_NUM_THREADS=2 python -m benchmarks.solvers.small --json FILE

Both start from a model with its data and end with means and variances; they take
turns in one process, and the ratio is that of their medians. CPU seconds are given
too, which other jobs on the machine do not reach as far.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from gpytorch.distributions import MultivariateNormal
from gpytorch.kernels import MaternKernel, ScaleKernel
from gpytorch.likelihoods import GaussianLikelihood
from gpytorch.means import ConstantMean
from gpytorch.models import ExactGP
from torch import Tensor

import sgdgp
from benchmarks.json_file import write_json

_DIM, _POINTS = 4, 100


class Model(ExactGP):
    """A Matern-5/2 kernel with a lengthscale for each input."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, GaussianLikelihood())
        self.mean_module = ConstantMean()
        self.covar_module = ScaleKernel(MaternKernel(ard_num_dims=_DIM))
        self.to(x).eval()

    def forward(self, x: Tensor) -> MultivariateNormal:
        """The prior."""
        return MultivariateNormal(self.mean_module(x), self.covar_module(x))


def ours(model: ExactGP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances by sgdgp."""
    posterior = sgdgp.condition(model, progress=False)
    return posterior.predict(x, batch_size=len(x), progress=False)


def theirs(model: ExactGP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Means and variances by GPyTorch."""
    found = model(x)
    return found.mean, found.variance


def measured(n: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """Medians of both, taking turns."""
    generator = torch.Generator().manual_seed(n)
    x, at = torch.rand(n + _POINTS, _DIM, generator=generator, dtype=dtype).split(
        [n, _POINTS]
    )
    y = x.sum(1).sin()
    clocks: dict[str, list[tuple[float, float]]] = {"sgdgp": [], "gpytorch": []}
    both: tuple[Callable[[ExactGP, Tensor], tuple[Tensor, Tensor]], ...] = ours, theirs
    for _ in range(repeats + 1):
        for name, predict in zip(clocks, both, strict=True):
            model = Model(x, y)
            start = time.perf_counter(), time.process_time()
            predict(model, at)
            wall = time.perf_counter() - start[0]
            clocks[name].append((wall, time.process_time() - start[1]))
    row: dict[str, Any] = {"n": n, "dtype": str(dtype), "repeats": repeats}
    for i, kind in enumerate(("seconds", "CPU seconds")):
        # The first round warms up.
        one, other = (median(c[i] for c in clock[1:]) for clock in clocks.values())
        row |= {f"{kind}, sgdgp": one, f"{kind}, gpytorch": other}
        row[f"ratio of {kind}"] = one / other
    return row


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and keep; 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args(arguments)
    rows = []
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64):
            for n in options.rows:
                row = measured(n, dtype, options.repeats)
                rows.append(row)
                print(f"{n:5d} rows, {dtype}:", end="")
                for kind in ("seconds", "CPU seconds"):
                    one, other = (
                        row[f"{kind}, {who}"] for who in ("sgdgp", "gpytorch")
                    )
                    print(
                        f"  {kind} {1e3 * one:.1f} / {1e3 * other:.1f} ms, "
                        f"ratio {row[f'ratio of {kind}']:.2f}",
                        end="",
                    )
                print(flush=True)
    if options.json:
        given = sys.argv[1:] if arguments is None else arguments
        command = "python -m benchmarks.solvers.small " + shlex.join(given)
        threads = torch.get_num_threads()
        write_json(options.json, {"command": command, "threads": threads, "rows": rows})
    return 0


if __name__ == "__main__":
    sys.exit(main())
