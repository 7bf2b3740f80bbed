"""How a few more observations would move a posterior: its gain.

For observations at u (q points) beside the data, with r = y - mean(u),

    mean'(x) = mean(x) + G(x) r,    f'_s(x) = f_s(x) + G(x) (y - f_s(u) - eps_s)
    G(x) = c(x, u) (c(u, u) + Sigma_u)^-1,   c(x, u) = k(x, u) - K(x, X) H^-1 K(X, u)

where c is the posterior covariance (Wilson et al., JMLR 2021, arXiv:2011.04026). No
Monte-Carlo error is in G; all of it is differentiable in x and in u.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from linear_operator.utils.cholesky import psd_safe_cholesky
from torch import Tensor

from sgdgp.core.slices import recomputed, slices
from sgdgp.operators.base import KernelOperator
from sgdgp.operators.evaluation import differentiable_block
from sgdgp.posterior.problem import Part
from sgdgp.solvers.differentiable import DifferentiableSolve

_ENTRIES = 2**21
"""Kernel entries held at once."""

_WASTED = 2**18
"""Entries between points of different batches that may be evaluated in vain."""


@dataclass(frozen=True, eq=False)
class Block:
    """Outputs that are correlated: those of one posterior of one output over rows.

    Attributes:
        part: The posterior.
        inverse: (K + Sigma)^-1 of its data.
        columns: Which outputs these are.
        tasks: Their tasks, where a row is a point and a task; else None.
        factor: Factors (T,) from the posterior's units to those of the outputs.
    """

    part: Part
    inverse: DifferentiableSolve
    columns: tuple[int, ...]
    tasks: tuple[int, ...] | None
    factor: Tensor

    def inputs(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b r p"]:
        """Kernel inputs of the rows of each batch, tasks of a point side by side."""
        points = x.flatten(0, 1)
        if self.tasks is not None:
            tasks = points.new_tensor(self.tasks)
            points = torch.cat(
                [
                    points.repeat_interleave(len(tasks), 0),
                    tasks.repeat(len(points)).unsqueeze(1),
                ],
                dim=1,
            )
        _, inputs = self.part.problem.prior.evaluate(points)
        return inputs.reshape(len(x), -1, inputs.shape[-1])


class Gain:
    """What observations of one block of outputs at u (b, q, d) tell about others.

    Attributes:
        covariance: Predictive covariance at u (b, r, r) with the noise, r = q T rows.
    """

    def __init__(
        self,
        block: Block,
        u: Float[Tensor, "b q d"],
        noise: Float[Tensor, "b r"],
    ) -> None:
        """Solves for the rows at u.

        Args:
            block: The outputs.
            u: Points of each batch.
            noise: Noise variances of the rows, in the units of the outputs.
        """
        self._block = block
        self._u = block.inputs(u)
        count, rows, dim = self._u.shape
        operator = self._operator
        flat = self._u.reshape(-1, dim)
        between = differentiable_block(operator.kernel, flat, operator.x).mT
        weights = block.inverse.solve(between.contiguous())
        n = len(between)
        # (b, n, r)
        self._weights = weights.reshape(n, count, rows).transpose(0, 1)
        between = between.reshape(n, count, rows).transpose(0, 1)
        prior = _own_blocks(operator, self._u, self._u)
        explained = between.mT @ self._weights
        explained = explained + explained.mT
        if block.inverse.is_direct:
            explained = explained / 2
        else:
            # The covariance of what these weights leave, whatever they are: positive,
            # and its error is of second order in theirs.
            product = block.inverse.product(weights).reshape(n, count, rows)
            explained = explained - self._weights.mT @ product.transpose(0, 1)
        self._factors = block.factor.repeat(u.shape[1])
        covariance = self._scaled(prior - explained, self._factors)
        self.covariance = covariance + torch.diag_embed(noise)
        self._root = psd_safe_cholesky(self.covariance)

    def at(self, x: Float[Tensor, "b q d"]) -> Float[Tensor, "b s r"]:
        """G at x (b, q', d), of the same batches: rows of x by rows of u."""
        inputs = self._block.inputs(x)
        operator = self._operator
        known = _own_products(operator, inputs, self._weights)
        cross = _own_blocks(operator, inputs, self._u) - known
        cross = self._scaled(cross, self._block.factor.repeat(x.shape[1]))
        return torch.cholesky_solve(cross.mT, self._root).mT

    @property
    def _operator(self) -> KernelOperator:
        return self._block.part.problem.operator

    def _scaled(self, covariance: Tensor, factors: Tensor) -> Tensor:
        """Rows and columns in the units of the outputs."""
        return factors.unsqueeze(1) * covariance * self._factors


def _own_blocks(operator: KernelOperator, x: Tensor, u: Tensor) -> Tensor:
    """k(x_b, u_b) of every batch b: (b, s, p), (b, r, p) -> (b, s, r)."""
    count, rows, columns = len(x), x.shape[1], u.shape[1]
    # Kernels take matrices: a few batches at once, of which the diagonal is wanted.
    together = max(1, int((_WASTED / max(1, rows * columns)) ** 0.5))
    blocks = []
    for some in slices(count, together):
        size = len(x[some])
        block = differentiable_block(
            operator.kernel, x[some].flatten(0, 1), u[some].flatten(0, 1)
        )
        diagonal = torch.arange(size, device=x.device)
        blocks.append(block.reshape(size, rows, size, columns)[diagonal, :, diagonal])
    return torch.cat(blocks) if blocks else x.new_zeros(0, rows, columns)


def _own_products(operator: KernelOperator, x: Tensor, v: Tensor) -> Tensor:
    """K(x_b, X) v_b of every batch b: (b, s, p), (b, n, r) -> (b, s, r)."""
    points = operator.x

    def product(part: Tensor, weights: Tensor) -> Tensor:
        block = differentiable_block(operator.kernel, part.flatten(0, 1), points)
        return block.view(*part.shape[:2], -1) @ weights

    rows = max(1, _ENTRIES // max(1, len(points)))
    batches = max(1, rows // max(1, x.shape[1]))
    products = []
    for some in slices(len(x), batches):
        inner = [
            recomputed(product, x[some][:, part], v[some])
            for part in slices(x.shape[1], rows)
        ]
        products.append(torch.cat(inner, dim=1))
    return torch.cat(products)
