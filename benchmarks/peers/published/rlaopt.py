"""github.com/udellgroup/rlaopt: ADASAP and block conjugate gradients, by KeOps.

ADASAP with the settings of its paper: blocks of n / 100 (at least its rank), Nystrom
preconditioner of rank 100, acceleration by mu = min(noise, b / n) and nu = n / b. The
compiled part, of sparse matrices, need not be built.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.peers.published.protocol import Solver, System, absent

_RANK = 100


def _solve(
    system: System, tolerance: float, accelerated: bool
) -> Iterator[tuple[Any, float]]:
    absent("wandb")
    absent("rlaopt._C")
    import torch
    from rlaopt.kernels import KernelConfig, Matern32LinOp
    from rlaopt.models import LinSys
    from rlaopt.preconditioners import NystromConfig
    from rlaopt.solvers import PCGConfig, SAPAccelConfig, SAPConfig, _get_solver

    torch.manual_seed(0)
    n, d = system.x.shape
    x, rhs = torch.from_numpy(system.x), torch.from_numpy(system.rhs)
    lengthscale, device = torch.full((d,), system.lengthscale), torch.device("cpu")
    operator = Matern32LinOp(x, x, KernelConfig(lengthscale=lengthscale))
    oracles = operator.row_oracle, operator.blk_oracle
    linear = LinSys(operator, rhs, system.noise, *oracles)
    rank = min(_RANK, n)
    block = max(n // 100, rank)

    def prepared() -> Any:
        nystrom = NystromConfig(rank=rank, rho=system.noise)
        shared = {"device": device, "precond_config": nystrom}
        if not accelerated:
            return _get_solver(linear, torch.zeros_like(rhs), PCGConfig(**shared))
        mu, nu = min(system.noise, block / n), n / block
        acceleration = SAPAccelConfig(mu=mu, nu=nu)
        config = SAPConfig(blk_sz=block, accel_config=acceleration, **shared)
        return _get_solver(linear, torch.zeros_like(rhs), config)

    prepared()._step()  # KeOps compiles
    yield None, 0.0
    solver = prepared()
    epochs = 0.0 if accelerated else 2.0  # the sketch and the first residual
    while True:
        solver._step()
        epochs += block / n if accelerated else 1.0
        yield solver.W, epochs


SOLVERS: dict[str, Solver] = {
    "adasap": partial(_solve, accelerated=True),
    "pcg": partial(_solve, accelerated=False),
}
