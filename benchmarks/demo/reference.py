"""The exact posterior at a few points: closed form, by one Cholesky factorisation."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

import sgdgp
from benchmarks.demo.problem import DemoGP
from sgdgp.operators import TiledOperator


@dataclass(frozen=True)
class Reference:
    """Closed-form posterior of the same model at the scored points.

    Attributes:
        mean: (m,).
        variance: Of the function, without noise (m,).
        residual: Largest relative residual of the solve.
        seconds: Wall time.
    """

    mean: Tensor
    variance: Tensor
    residual: float
    seconds: float


@torch.no_grad()
def exact_posterior(model: DemoGP, x_test: Float[Tensor, "m 1"]) -> Reference:
    """Mean and variance with H = K(X, X) + noise, from one factorisation of H.

        mean(x) = K(x, X) H^-1 y,   variance(x) = k(x, x) - K(x, X) H^-1 K(X, x)

    The targets and the columns K(X, x) are solved for together, in float64: the
    same kernel and data as ``sgdgp.condition`` sees, without prior draws.

    Args:
        model: A zero-mean GP that holds its training data.
        x_test: Where the posterior is wanted (m, 1).
    """
    start = time.perf_counter()
    x, y = model.train_inputs[0].double(), model.train_targets.double()
    x_test, kernel = x_test.double(), model.covar_module
    # Streamed: the only matrix (n, n) in memory is the factor.
    operator = TiledOperator(kernel, x)
    cross = operator.cross(x_test)
    columns = cross.block(slice(0, len(x_test)), slice(0, len(x))).mT
    solution = sgdgp.Cholesky().solve(
        operator,
        model.likelihood.noise.double(),
        torch.cat([y[:, None], columns], dim=1),
    )
    products = columns.mT @ solution.weights[:, :1]
    explained = (columns * solution.weights[:, 1:]).sum(0)
    prior = TiledOperator(kernel, x_test).diagonal()
    return Reference(
        mean=products[:, 0],
        variance=prior - explained,
        residual=float(solution.residuals.max()),
        seconds=time.perf_counter() - start,
    )
