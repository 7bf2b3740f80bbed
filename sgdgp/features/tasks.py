"""Features of several outputs: tables between tasks, and pairs (input, output).

The index kernel's features are exact; its products with other maps are formed task by
task. A map with several rows per input is one over pairs of input and output.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import check_product, check_width, tracks_gradient
from sgdgp.features.base import FeatureMap, Features, Points, Values, Weights


@register_stored_class
class IndexFeatures(FeatureMap):
    """phi(t) = R[t, :] with R R^T = B: k(t, t') = B[t, t'].

    Args:
        root: R (T, T).
    """

    exact = True

    def __init__(self, root: Float[Tensor, "T M"]) -> None:
        self.root = root
        self.num_features = root.shape[1]

    def tasks(self, x: Float[Tensor, "n 1"]) -> Tensor:
        """Task of each row (n,).

        Raises:
            ValueError: x has more than one column, or a task that B has not.
        """
        check_width(x, 1)
        tasks = x[:, 0].detach().long()
        count = len(self.root)
        if tasks.numel() and not 0 <= int(tasks.min()) <= int(tasks.max()) < count:
            raise ValueError(
                f"x: expected tasks from 0 to {count - 1}, found {int(tasks.min())} to "
                f"{int(tasks.max())}"
            )
        return tasks

    def features(self, x: Points) -> Features:
        rows = self.root[self.tasks(x)]
        # Tied to x in the graph; their gradient is zero.
        return rows + 0 * x if x.requires_grad else rows

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, self.num_features)
        rows = (self.root @ w)[self.tasks(x)]
        return rows + 0 * x if x.requires_grad else rows

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        sums = v.new_zeros(len(self.root), v.shape[1])
        return self.root.T @ sums.index_add(0, self.tasks(x), v)


@register_stored_class
class TaskFeatures(FeatureMap):
    """All products other_j(x) R[t, i]: a table between tasks times another kernel.

    The tensor product of ``IndexFeatures`` and another map, which makes use of R[t, :]
    being the same in all rows of a task: the other map is multiplied with as many
    columns as there are functions, and not T times as many. Feature (j, i) has index
    j * T + i.

    Args:
        index: The table's features.
        column: Column of x that holds the tasks.
        other: Any map that is independent of the table.
    """

    def __init__(self, index: IndexFeatures, column: int, other: FeatureMap) -> None:
        self.index = index
        self.column = column
        self.other = other
        self.num_features = index.num_features * other.num_features
        self.exact = other.exact

    def features(self, x: Points) -> Features:
        other, small = self.other.features(x), self.index.features(self._tasks_of(x))
        return (other[:, :, None] * small[:, None, :]).flatten(1)

    def forward(self, x: Points, w: Weights) -> Values:
        check_product("w", w, self.num_features)
        w = w.reshape(self.other.num_features, self.index.num_features, -1)
        found, order = [x.new_zeros(0, w.shape[2])], []
        for root, rows in self._by_task(x):
            own = torch.einsum("mts,t->ms", w, root)
            found.append(self.other.forward(x[rows], own))
            order.append(rows)
        if not order:
            return found[0]
        return torch.cat(found)[torch.cat(order).argsort()]

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, x.shape[0])
        shape = self.other.num_features, self.index.num_features, v.shape[1]
        out = x.new_zeros(shape)
        for root, rows in self._by_task(x):
            own = self.other.adjoint(x[rows], v[rows])
            out = out + own[:, None, :] * root[None, :, None]
        return out.flatten(0, 1)

    def restricted(self, dims: Tensor) -> FeatureMap:
        column = int(dims[self.column])
        return TaskFeatures(self.index, column, self.other.restricted(dims))

    def _tasks_of(self, x: Tensor) -> Tensor:
        return x[:, self.column : self.column + 1]

    def _by_task(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """R[t, :] and the rows of every task that occurs."""
        tasks = self.index.tasks(self._tasks_of(x))
        for task in tasks.unique().tolist():
            yield self.index.root[task], (tasks == task).nonzero().squeeze(1)


@register_stored_class
class PairFeatures(FeatureMap):
    """phi([x, t]) = phi_t(x), for a map with C rows phi_1(x) ... phi_C(x) per input.

    Rows that follow one another and have the same x are evaluated as one point: all
    outputs of an input cost what one of them does.

    Args:
        base: A map whose row i C + c is output c of input i.
        outputs: C.
    """

    def __init__(self, base: FeatureMap, outputs: int) -> None:
        self.base = base
        self.outputs = outputs
        self.num_features = base.num_features
        self.exact = base.exact

    def features(self, x: Points) -> Features:
        points, rows = self._points(x)
        return self.base.features(points)[rows]

    def forward(self, x: Points, w: Weights) -> Values:
        points, rows = self._points(x)
        return self.base.forward(points, w)[rows]

    def adjoint(self, x: Points, v: Values) -> Weights:
        check_product("v", v, len(x))
        points, rows = self._points(x)
        whole = v.new_zeros(len(points) * self.outputs, v.shape[1])
        return self.base.adjoint(points, whole.index_add(0, rows, v))

    def point_of_rows(self, x: Points) -> Tensor | None:
        return _numbers(x)

    def _points(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return points_and_rows(x, self.outputs)


def points_and_rows(
    x: Float[Tensor, "n d"], outputs: int
) -> tuple[Float[Tensor, "p k"], Int[Tensor, " n"]]:
    """The points behind pairs, and the row of each pair among those of the points.

    Args:
        x: Rows [x, t].
        outputs: Rows of a point.

    Raises:
        ValueError: A pair is of an output that there is not.
    """
    output = x[:, -1].detach().round().long()
    if len(x) and not 0 <= int(output.min()) <= int(output.max()) < outputs:
        raise ValueError(
            f"x: expected outputs from 0 to {outputs - 1} in its last column, found "
            f"{int(output.min())} to {int(output.max())}"
        )
    if tracks_gradient(x):
        # Rows of one point are different leaves of the graph.
        number = torch.arange(len(x), device=x.device)
        return x[:, :-1], number * outputs + output
    number = _numbers(x)
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    return x[first, :-1], number * outputs + output


def _numbers(x: Float[Tensor, "n d"]) -> Int[Tensor, " n"]:
    """Number of the point that each pair belongs to, counted from the first row."""
    if not len(x):
        return torch.zeros(0, dtype=torch.long, device=x.device)
    inputs = x[:, :-1].detach()
    changes = (inputs[1:] != inputs[:-1]).any(1)
    return torch.cat([changes.new_zeros(1), changes]).cumsum(0)
