"""K shared by the processes of a team: tiles or rows of a product are cut among them.

Every process holds the points, n d numbers. Of a product with all of a symmetric K each
makes its share of the tiles on and above the diagonal, and the leader
(``core/team.py``) has the sum of what they found: the same as in one process but for
rounding. Of any other product each makes its share of the rows of K[i, :] V, which the
leader puts together. The solvers run in the leader alone.

V (n, k) goes to the others with every product, n k numbers beside n^2 / r entries to
evaluate. Stochastic solvers need a product with few rows in every step, while V changes
on a block: their V is sent once and follows by its moves, b k numbers a step, and each
process has a share of the columns, so that tiles are as high as those of one. What
follows from few rows is not worth a message and stays in the leader: blocks, the
diagonal, products of less than some hundred rows.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy, deepcopy
from typing import Any, Literal

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.processes import Processes
from sgdgp.core.slices import slices, tracks_gradient
from sgdgp.core.team import Found, follow, is_kept, is_led, keep, together
from sgdgp.operators.arguments import check_vectors, index_length, piece
from sgdgp.operators.base import KernelOperator, RowIndex
from sgdgp.operators.dense import streaming_operator
from sgdgp.operators.evaluation import tensors_with_graph
from sgdgp.operators.gradients import with_gradient
from sgdgp.operators.tiled import TiledOperator
from sgdgp.operators.tracked import Move, TrackedVectors

_FEWEST_ROWS = 256
"""Rows of a product whose V has to be sent: fewer are done before it has arrived."""

_BLOCK_ROWS = 8192
"""Rows of K[:, index] that are held at a time."""


class ShardedOperator(KernelOperator):
    """K(X1, X2) by all processes that ``sgdgp.distribute`` has at work.

    Alone it is the streaming operator behind it. Hyperparameters of products are those
    at construction.

    Args:
        kernel: A GPyTorch kernel without batch shape.
        x: Column inputs X2 (n, d); every process holds them.
        x_rows: Row inputs X1 (m, d). Default: ``x``.
        memory_budget: Bytes that temporaries may take, in each process. Default: half
            of what is free.

    Attributes:
        local: The operator that each process does its share with.

    Raises:
        ValueError: The kernel is one of exact features, such as that of a network.
    """

    name = "sharded"
    rows_per_step = 1 << 30  # V is sent once for all rows

    def _prepare(self) -> None:
        x_rows = None if self.is_square else self.x_rows
        self._stand_for(
            streaming_operator(self.kernel, self.x, x_rows, self.memory_budget)
        )

    @classmethod
    def over(cls, local: KernelOperator) -> ShardedOperator:
        """The same matrix as a streaming operator, shared."""
        operator = cls.__new__(cls)
        operator._stand_for(local)
        return operator

    def _stand_for(self, local: KernelOperator) -> None:
        if local.has_features:
            raise ValueError(
                f"{type(local.kernel).__name__} is a kernel of exact features, whose "
                "products the sharded operator does not share; take 'features'"
            )
        self._hold_as(local)
        # As it is now, here and elsewhere: an optimiser may move it before it is sent.
        self._sent = _frozen(local.kernel)
        if not isinstance(local, TiledOperator):
            x_rows = None if local.is_square else local.x_rows
            local = local._rebuilt(local.x, x_rows, self._sent)
        self.local = local

    def __reduce__(self) -> tuple[Any, ...]:
        """By what it stands for, which may be there already where this arrives."""
        return ShardedOperator.over, (self.local,)

    @property
    def is_shared(self) -> bool:
        """Whether there are others, and not all at work already."""
        return is_led()

    def everywhere(
        self,
        function: Callable[..., Found],
        *args: Any,
        by: Literal["rows", "sum"] = "rows",
    ) -> Found:
        """See ``KernelOperator.everywhere``; each with a local operator."""
        local = self.local
        keep(
            local,
            _operator,
            type(local),
            self._sent,
            local.x,
            None if local.is_square else local.x_rows,
            local.memory_budget,
        )
        return together(function, local, *args, by=by)

    def _rows_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        if index_length(index) < _FEWEST_ROWS:
            return self.local._rows_matmul(index, v)
        return self.everywhere(_rows_product, index, v)[0]

    @torch.no_grad()
    def matmul(self, v: Float[Tensor, "n k"]) -> Float[Tensor, "m k"]:
        """K v, its rows or its tiles cut among the processes."""
        check_vectors(v, self.shape[1], self.dtype)
        if not is_led():
            return self.local.matmul(v)
        if self.is_square and self.local.sums_tiles:
            return self.everywhere(_tiles_product, v, by="sum")[0]
        return self._rows_matmul(slice(0, self.shape[0]), v)

    def _columns_matmul(self, index: RowIndex, v: Tensor) -> Tensor:
        return self.everywhere(_columns_product, index, v)[0]

    def product_at(
        self, x_new: Float[Tensor, "m d"], v: Float[Tensor, "n k"]
    ) -> Float[Tensor, "m k"]:
        """See ``KernelOperator.product_at``; with a graph to x_new not shared."""
        if tracks_gradient(x_new) or len(x_new) < _FEWEST_ROWS:
            return self.local.product_at(x_new, v)
        return self.everywhere(_product_at, x_new, v)[0]

    def tracked(self, v: Float[Tensor, "n k"]) -> TrackedVectors:
        """Coefficients that the others follow from their first product on."""
        return FollowedVectors(v.clone())

    def rows_of_product(
        self, rows: RowIndex, v: TrackedVectors
    ) -> Float[Tensor, "b k"]:
        """K[rows, :] V, without sending V."""
        if not is_led() or not isinstance(v, FollowedVectors):
            return super().rows_of_product(rows, v)
        v.keep()
        if self.local.sums_tiles:
            return self.everywhere(_followed_sum, rows, v, by="sum")[0]
        return self.everywhere(_followed_rows, rows, v)[0]

    def _quadratic_form(self, a: Tensor, b: Tensor, x: Tensor) -> Tensor:
        if not is_led():
            local = copy(self.local)
            local.kernel = self.kernel  # as it is now, not as at construction
            return local._quadratic_form(a, b, x)
        inputs = [*tensors_with_graph(self.kernel), *([x] if x.requires_grad else [])]
        if not torch.is_grad_enabled():
            inputs = []
        value, *gradients = self.everywhere(
            _form, _frozen(self.kernel), a, b, x, bool(inputs), by="sum"
        )
        return with_gradient(value, inputs, gradients)

    def _block(self, i: RowIndex, j: RowIndex) -> Tensor:
        return self.local._block(i, j)

    def _diagonal_entries(self) -> Tensor:
        return self.local._diagonal_entries()

    def _rebuilt(
        self, x: Tensor, x_rows: Tensor | None, kernel: Kernel | None = None
    ) -> ShardedOperator:
        kernel = self.kernel if kernel is None else kernel
        return ShardedOperator.over(self.local._rebuilt(x, x_rows, kernel))


class FollowedVectors(TrackedVectors):
    """V that the other processes hold too, from ``keep`` on, and change alike."""

    def keep(self) -> None:
        """Send V, once."""
        keep(self, TrackedVectors, self.values)

    def clone(self) -> TrackedVectors:
        """A copy, which has to be sent again."""
        return FollowedVectors(self.values.clone())

    def zeros_like(self) -> TrackedVectors:
        """Zero."""
        return FollowedVectors(torch.zeros_like(self.values))

    def columns(self, chosen: Tensor) -> TrackedVectors:
        """Some columns, by a mask or indices, contiguous."""
        found = FollowedVectors(self.values[:, chosen].contiguous())
        if is_kept(self):
            follow(TrackedVectors.columns, self, chosen, into=found)
        return found

    def move(self, move: Move, factor: float = 1.0) -> None:
        """V[rows] += factor * values."""
        if is_kept(self):
            follow(TrackedVectors.move, self, move, factor)
        super().move(move, factor)

    def add(self, other: TrackedVectors, factor: float = 1.0) -> None:
        """V += factor * other."""
        self._follow(TrackedVectors.add, other, factor)
        super().add(other, factor)

    def scale(self, factor: float) -> None:
        """V *= factor."""
        self._follow(TrackedVectors.scale, factor)
        super().scale(factor)

    def set_to_difference(
        self, a: TrackedVectors, b: TrackedVectors, factor: float
    ) -> None:
        """V = a - factor * b."""
        self._follow(TrackedVectors.set_to_difference, a, b, factor)
        super().set_to_difference(a, b, factor)

    def copy(self, other: TrackedVectors) -> None:
        """V = other."""
        self._follow(TrackedVectors.copy, other)
        super().copy(other)

    def _follow(self, change: Any, *args: Any) -> None:
        """Make a change elsewhere too, if V is there."""
        if not is_kept(self):
            return
        for each in args:
            if isinstance(each, FollowedVectors):
                each.keep()
        # All of V changes, which takes longer than a message: at the same time as here.
        follow(change, self, *args, at_once=True)


def _operator(
    kind: type[KernelOperator],
    kernel: Kernel,
    x: Tensor,
    x_rows: Tensor | None,
    memory_budget: int,
) -> KernelOperator:
    """What another process does its share with."""
    return kind(kernel, x, x_rows, memory_budget=memory_budget)


def _rows_product(
    processes: Processes, operator: KernelOperator, index: RowIndex, v: Tensor
) -> Found:
    """A share of K[index, :] v."""
    return (operator.rows(_share(processes, index)).matmul(v),)


def _tiles_product(processes: Processes, operator: KernelOperator, v: Tensor) -> Found:
    """K v (n, k) by a share of the tiles of K."""
    return (_part(operator, processes).matmul(v),)


def _followed_rows(
    processes: Processes, operator: KernelOperator, index: RowIndex, v: TrackedVectors
) -> Found:
    """A share of the rows of K[index, :] V."""
    return _rows_product(processes, operator, index, v.values)


def _followed_sum(
    processes: Processes, operator: KernelOperator, index: RowIndex, v: TrackedVectors
) -> Found:
    """K[index, :] V by a share of the columns: tiles stay as high as they are alone."""
    return (_part(operator, processes)._rows_matmul(index, v.values),)


def _columns_product(
    processes: Processes, operator: KernelOperator, index: RowIndex, v: Tensor
) -> Found:
    """A share of the rows of K[:, index] v."""
    own = processes.rows(operator.shape[0])
    out = v.new_empty(index_length(own), v.shape[1])
    for rows in slices(len(out), min(operator.rows_per_step, _BLOCK_ROWS)):
        torch.mm(operator.block(piece(own, rows), index), v, out=out[rows])
    return (out,)


def _product_at(
    processes: Processes, operator: KernelOperator, x: Tensor, v: Tensor
) -> Found:
    """A share of K(x, X) v."""
    return (operator.cross(x[processes.rows(len(x))]).matmul(v),)


def _form(
    processes: Processes,
    operator: KernelOperator,
    kernel: Kernel,
    a: Tensor,
    b: Tensor,
    x: Tensor,
    wants_gradient: bool,
) -> Found:
    """A share of sum_c a_c^T K b_c, and of its gradients."""
    operator = _part(operator, processes)
    operator.kernel = kernel
    with torch.set_grad_enabled(wants_gradient):
        x = x.detach().requires_grad_(x.requires_grad)
        form = operator._quadratic_form(a, b, x)
    if not wants_gradient:
        return (form,)
    inputs = [*tensors_with_graph(kernel), *([x] if x.requires_grad else [])]
    gradients = torch.autograd.grad(form, inputs, materialize_grads=True)
    return (form.detach(), *gradients)


def _part(operator: KernelOperator, processes: Processes) -> KernelOperator:
    """The operator that sums this process's tiles."""
    operator = copy(operator)
    operator.part = processes
    return operator


def _share(processes: Processes, index: RowIndex) -> RowIndex:
    """This process's part of some rows."""
    return piece(index, processes.rows(index_length(index)))


def _frozen(kernel: Kernel) -> Kernel:
    """A copy with tensors of its own; those with a graph are leaves of another."""
    return deepcopy(
        kernel,
        {
            id(tensor): tensor.detach().clone().requires_grad_()
            for tensor in tensors_with_graph(kernel)
            if not tensor.is_leaf
        },
    )
