"""github.com/jandylin/iterative-gaussian-processes: the solvers of NeurIPS 2024.

Conjugate gradients (pivoted Cholesky, rank 100), alternating projections and gradient
descent, with blocks as in its ``config.yaml``. They end by residuals of their own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from benchmarks.peers.published.protocol import Solver, System, absent

BLOCK = 500


def absent_modules() -> None:
    """Do without what it imports for its records and data sets."""
    absent("wandb")
    absent("uci_datasets", all_datasets={}, Dataset=None)


def _solve(
    system: System, tolerance: float, solver: str, by_blocks: bool
) -> Iterator[tuple[Any, float]]:
    absent_modules()
    import jax.numpy as jnp
    import kernels
    import linear_solvers
    import structs

    n, d = system.x.shape
    block = min(BLOCK, n // 2)
    lengthscale = jnp.full((d,), system.lengthscale, jnp.float32)
    parameters = structs.ModelParams(
        noise_scale=math.sqrt(system.noise),
        kernel_params=structs.KernelParams(signal_scale=1.0, length_scale=lengthscale),
    )
    x, rhs = jnp.asarray(system.x), jnp.asarray(system.rhs)
    run = partial(
        getattr(linear_solvers, solver),
        model_params=parameters,
        x=x,
        kernel_fn=kernels.matern32_kernel_fn,
        rtol_y=tolerance,
        rtol_z=tolerance,
        max_epochs=math.ceil(system.max_epochs),
        batch_size=block,
    )
    zero = jnp.zeros_like(rhs)
    np.asarray(run(zero, zero)[0])  # of no right-hand side: compiled, ended at once
    yield None, 0.0
    weights, iterations, *_ = run(zero, rhs)
    weights = np.asarray(weights)
    yield weights, float(iterations) * (block / n if by_blocks else 1.0)


SOLVERS: dict[str, Solver] = {
    "cg": partial(_solve, solver="cg_solver", by_blocks=False),
    "ap": partial(_solve, solver="ap_solver", by_blocks=True),
    "sgd": partial(_solve, solver="sgd_solver", by_blocks=True),
}
