"""The exact posterior by Cholesky in float64, to compare with where it fits."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.dockstring.model import TanimotoGP, values_of
from benchmarks.uci.memory import check_fits

_BLOCK = 1024


@torch.no_grad()
def exact_prediction(
    model: TanimotoGP,
    x: Float[Tensor, "n d"],
    y: Float[Tensor, " n"],
    x_test: Float[Tensor, "m d"],
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Mean and variance (m,) of the function, without noise.

    Raises:
        DoesNotFitError: n x n numbers do not fit into memory.
    """
    check_fits("the exact posterior", len(x), 20.0 * len(x) ** 2)
    values, kernel = values_of(model), model.covar_module
    x, y, x_test = x.double(), y.double(), x_test.double()
    matrix = x.new_empty(len(x), len(x))
    for rows, part in zip(matrix.split(_BLOCK), x.split(_BLOCK), strict=True):
        rows.copy_(kernel(part, x).to_dense())
    matrix.diagonal().add_(values["noise"])
    factor = torch.linalg.cholesky(matrix)
    del matrix
    weights = torch.cholesky_solve((y - values["mean"]).unsqueeze(1), factor)
    means, variances = [], []
    for part in x_test.split(_BLOCK):
        cross = kernel(x, part).to_dense().double()
        means.append(values["mean"] + (cross.mT @ weights).squeeze(1))
        root = torch.linalg.solve_triangular(factor, cross, upper=False)
        variances.append(values["amplitude"] - root.square().sum(0))
    return torch.cat(means), torch.cat(variances)
