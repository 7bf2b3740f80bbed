"""A posterior with 64 samples from a million rows, on one card; fewer on a CPU.

    python -m examples.million_rows
    python -m examples.million_rows --rows 100000 --checkpoint run.safetensors

The data are a draw from the prior that is solved for (Matern-3/2, d = 8, noise variance
0.1). What fills the memory is printed before anything is drawn. A killed run goes on
from its checkpoint. At the end the residual is computed anew, from kernel entries that
GPyTorch evaluates in float64, at rows that the solver did not choose.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import gpytorch
import torch
from torch import Tensor

import sgdgp
from sgdgp.core.memory import free_memory
from sgdgp.features import draw_prior
from sgdgp.solvers import PivotedCholesky
from sgdgp.solvers.preconditioners import default_rank

_DIM, _LENGTHSCALE, _NOISE = 8, 2.0, 0.1
_TEST_ROWS, _CHECKED_ROWS = 10_000, 100
_COLUMNS = 50_000
"""Of K, in float64, at a time."""

_VECTORS = 10
"""Matrices as large as the right-hand sides: those, weights, residuals, directions and
their products with K, each where conjugate gradients work and where they hand over."""


class Model(gpytorch.models.ExactGP):
    """A constant mean and a scaled Matern-3/2 kernel."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        self.mean_module = gpytorch.means.ZeroMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(
            gpytorch.kernels.MaternKernel(nu=1.5, ard_num_dims=_DIM)
        )
        self.covar_module.base_kernel.lengthscale = _LENGTHSCALE
        self.covar_module.outputscale = 1.0
        self.likelihood.noise = _NOISE

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The prior at x (n, d)."""
        return gpytorch.distributions.MultivariateNormal(
            self.mean_module(x), self.covar_module(x)
        )


def memory_plan(rows: int, samples: int, rank: int) -> dict[str, int]:
    """Bytes of what is large, in float32."""
    columns = samples + 1
    return {
        f"inputs, {rows:,} x {_DIM}, and their scaled forms": 4 * 4 * rows * _DIM,
        f"right-hand sides and {_VECTORS - 1} matrices like them": (
            _VECTORS * 4 * rows * columns
        ),
        f"factor of the preconditioner, rank {rank}, in float64": 8 * rows * rank,
        "its basis in float32": 4 * rows * rank,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Plan, draw, solve, check, predict; the exit status says whether all held."""
    parser = _parser()
    options = parser.parse_args(arguments)
    for name in ("rows", "samples"):
        if getattr(options, name) < 1:
            parser.error(
                f"--{name}: expected at least 1, found {getattr(options, name)}"
            )
    device = torch.device(options.device)
    rank = min(options.rank or default_rank(options.rows), options.rows)
    memory = memory_plan(options.rows, options.samples, rank)
    for what, size in memory.items():
        print(f"{size / 1e9:8.2f} GB  {what}")
    total, free = sum(memory.values()), free_memory(device)
    print(f"{total / 1e9:8.2f} GB  of {free / 1e9:.1f} GB that are free on {device}")
    if total > free:
        print("too much: give fewer rows or samples, or a smaller rank")
        return 1

    clock = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    x = torch.randn(options.rows, _DIM, generator=generator).to(device)
    model = Model(x, x.new_zeros(options.rows)).to(device)
    function = draw_prior(
        model.covar_module,
        1,
        dim=_DIM,
        num_features=4096,
        generator=generator,
        dtype=x.dtype,
        device=device,
    )
    with torch.no_grad():
        noise = torch.randn(options.rows, generator=generator).to(device)
        y = function(x)[:, 0] + _NOISE**0.5 * noise
    print(f"data: {time.perf_counter() - clock:.1f} s")

    posterior = sgdgp.condition(
        model,
        x,
        y,
        solver=sgdgp.CG(
            tolerance=options.tolerance, preconditioner=PivotedCholesky(rank)
        ),
        num_samples=options.samples,
        seed=options.seed,
        checkpoint=options.checkpoint,
    )
    solution = posterior.solution
    print(
        f"{solution.solver} on {solution.operator}: {solution.reason}, "
        f"{solution.passes:.1f} passes, {solution.seconds:.1f} s of "
        f"{time.perf_counter() - clock:.1f} s"
    )
    checked = residual_at_random_rows(posterior, generator)
    print(
        f"residual by the solver {float(solution.residuals.max()):.1e}, at "
        f"{_CHECKED_ROWS} random rows in float64 {checked:.1e}"
    )

    clock = time.perf_counter()
    test = torch.randn(_TEST_ROWS, _DIM, generator=generator).to(device)
    prediction = posterior.predict(test)
    with torch.no_grad():
        truth = function(test)[:, 0]
    rmse = sgdgp.metrics.rmse(prediction.mean, truth)
    print(
        f"{_TEST_ROWS:,} predictions: {time.perf_counter() - clock:.1f} s, RMSE "
        f"{float(rmse):.3f} (noise {_NOISE**0.5:.3f})"
    )
    if device.type == "cuda":
        print(f"peak {torch.cuda.max_memory_allocated(device) / 1e9:.1f} GB")
    # Rows are few: their root mean square is known to a fifteenth.
    held = solution.reason == "converged" and checked < 1.5 * options.tolerance
    return 0 if held else 3


def residual_at_random_rows(
    posterior: sgdgp.PathwisePosterior, generator: torch.Generator
) -> float:
    """Largest of |K V + noise V - B| / |B| over all columns, at some rows."""
    problem, weights = posterior.problem, posterior.solution.weights.double()
    kernel = problem.prior.model.covar_module
    index = torch.randperm(len(weights), generator=generator)[:_CHECKED_ROWS]
    index = index.to(weights.device)
    some = problem.x[index].double()
    product = problem.noise[index, None] * weights[index]
    for x, v in zip(problem.x.split(_COLUMNS), weights.split(_COLUMNS), strict=True):
        with torch.no_grad():
            product += kernel(some, x.double()).to_dense() @ v
    rhs = problem.rhs[index]
    return float(((product - rhs).norm(dim=0) / rhs.norm(dim=0)).max())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.million_rows")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add = parser.add_argument
    add("--rows", type=int, default=1_000_000)
    add("--samples", type=int, default=64)
    add("--tolerance", type=float, default=1e-2, help="relative residual")
    add("--rank", type=int, help="of the preconditioner (default: by the rows)")
    add("--device", default=device)
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, help="file that a killed run goes on from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
