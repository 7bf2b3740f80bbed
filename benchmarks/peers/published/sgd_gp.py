"""github.com/cambridge-mlg/sgd-gp: stochastic dual descent of the ICLR 2024 paper.

Its gradient variant "batch_all", with what ``configs/default.py`` has for it: Nesterov
momentum .9, blocks of 512 from shuffled epochs, averaging 100 / steps. All columns are
samples of one update, as where it draws posterior samples. The step size is K / n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.peers.published.protocol import Solver, System, absent

_BLOCK = 512


def _sdd(system: System, tolerance: float, step: float) -> Iterator[tuple[Any, float]]:
    absent("wandb", run=None)
    absent("uci_datasets", all_datasets={}, Dataset=None)
    import jax.numpy as jnp
    import jax.random as jr
    import optax
    from scalable_gps import kernels, optim_utils, utils

    n, d = system.x.shape
    block, noise_scale = min(_BLOCK, n), math.sqrt(system.noise)
    lengthscale = jnp.full((d,), system.lengthscale, jnp.float32)
    kernel = kernels.Matern32Kernel({"signal_scale": 1.0, "length_scale": lengthscale})
    gradient = optim_utils.get_stochastic_gradient_fn(
        jnp.asarray(system.x), kernel.kernel_fn, noise_scale, "batch_all"
    )
    horizon = math.ceil(system.max_epochs * n / block)
    optimiser = optax.sgd(learning_rate=step, momentum=0.9, nesterov=True)
    update = optim_utils.get_update_fn(
        gradient, optimiser, min(1.0, 100.0 / horizon), vmap_and_pmap=True
    )
    rows = optim_utils.get_idx_fn(block, n, iterative_idx=True, share_idx=False)
    rhs = jnp.asarray(system.rhs.T[None])  # devices, samples, n
    key, zero = jr.PRNGKey(0), jnp.zeros_like(rhs)
    targets = utils.TargetTuple(error_target=rhs, regularizer_target=zero)
    state = zero, zero, optimiser.init(zero)

    def after(state: Any, i: int) -> Any:
        weights, average, momentum = state
        state = update(weights, average, rows(i, key), None, momentum, targets)
        state[1].block_until_ready()
        return state

    after(state, 0)
    yield None, 0.0
    for i in range(horizon):
        state = after(state, i)
        yield state[1][0].T, (i + 1) * block / n


SOLVERS: dict[str, Solver] = {
    f"sdd-{step}": partial(_sdd, step=float(step)) for step in (1, 5, 10)
}
