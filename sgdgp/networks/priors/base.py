"""Gaussian priors over the weights of a network, as roots of their covariances.

Sigma_0 = R R^T (D, D) is never formed. A root is diagonal, or Kronecker-factored within
each weight matrix; on top of either, every group of weights has a precision alpha that
learning moves: R = R_1 alpha^-1/2. Vectors are the columns of (D, k) matrices that lie
in memory as the transposes of contiguous (k, D) ones.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.codec import register_stored_class


class WeightPrior(ABC):
    """N(0, R R^T) over the weights, R = R_1 with group g scaled by alpha_g^-1/2.

    Args:
        num_weights: D.
        precisions: alpha (G,), positive.
        groups: Slices that partition 0..D in order. Default: one.
        group_of: Which precision each slice has; slices may share one. Default: each
            slice its own.

    Raises:
        ValueError: The slices are no partition, or the precisions do not fit them.
    """

    def __init__(
        self,
        num_weights: int,
        precisions: Float[Tensor, " G"],
        groups: Sequence[slice] | None = None,
        group_of: Sequence[int] | None = None,
    ) -> None:
        self.num_weights = num_weights
        self.groups = (slice(0, num_weights),) if groups is None else tuple(groups)
        self.group_of = (
            tuple(range(len(self.groups))) if group_of is None else tuple(group_of)
        )
        self.precisions = precisions
        _check_partition(self.groups, num_weights)
        wanted = max(self.group_of) + 1
        if sorted(set(self.group_of)) != list(range(wanted)) or len(
            self.group_of
        ) != len(self.groups):
            raise ValueError(
                f"group_of: expected the numbers 0..G-1 for {len(self.groups)} slices, "
                f"found {self.group_of}"
            )
        if precisions.shape != (wanted,):
            raise ValueError(
                f"precisions: expected shape ({wanted},), one for each group, found "
                f"{tuple(precisions.shape)}"
            )
        if not (torch.isfinite(precisions) & (precisions > 0)).all():
            raise ValueError(
                "precisions: expected positive finite numbers, found "
                f"{precisions.tolist()[:8]}"
            )

    @property
    def num_groups(self) -> int:
        """G, the number of precisions."""
        return self.precisions.shape[0]

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """How many weights each group has."""
        sizes = [0] * self.num_groups
        for s, g in zip(self.groups, self.group_of, strict=True):
            sizes[g] += s.stop - s.start
        return tuple(sizes)

    def root(self, z: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """R z: whitened coordinates to weights."""
        return self._apply(self._rows(z), adjoint=False).mT

    def root_adjoint(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """R^T w."""
        return self._apply(self._rows(w), adjoint=True).mT

    def covariance(self, w: Float[Tensor, "D k"]) -> Float[Tensor, "D k"]:
        """Sigma_0 w = R R^T w."""
        return self.root(self.root_adjoint(w))

    def group_sums(
        self, a: Float[Tensor, "D k"], b: Float[Tensor, "D k"]
    ) -> Float[Tensor, "G k"]:
        """Inner products of the columns of a and b, group by group.

        Summed over the groups they are ``(a * b).sum(0)``; nothing of that size is
        kept.
        """
        found = a.new_zeros(self.num_groups, a.shape[1])
        for s, g in zip(self.groups, self.group_of, strict=True):
            found[g] += torch.linalg.vecdot(a.mT[:, s], b.mT[:, s])
        return found

    def with_precisions(self, precisions: Float[Tensor, " G"]) -> WeightPrior:
        """The same prior with other precisions; R scales by alpha^-1/2.

        Raises:
            ValueError: Not one positive finite number for each group.
        """
        return self._rebuilt(precisions.to(self.precisions), self.groups, self.group_of)

    def rewhiten(
        self, v: Float[Tensor, "D k"], old: WeightPrior
    ) -> Float[Tensor, "D k"]:
        """R^-1 R_old v, the same weights as v under a prior of other precisions."""
        factors = (self.precisions / old.precisions).sqrt()
        out = v.mT.clone()
        for group, number in zip(self.groups, self.group_of, strict=True):
            out[:, group] *= factors[number]
        return out.mT

    @abstractmethod
    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        """Product of R or R^T with each of the rows (k, D), as rows."""

    @abstractmethod
    def _rebuilt(
        self, precisions: Tensor, groups: Sequence[slice], group_of: Sequence[int]
    ) -> WeightPrior:
        """The same root under other precisions and groups."""

    def _scale(self) -> Tensor:
        """alpha^-1/2, one number or one for each weight (D,)."""
        scales = self.precisions.rsqrt()
        if self.num_groups == 1:
            return scales[0]
        lengths = torch.tensor([s.stop - s.start for s in self.groups])
        index = torch.tensor(self.group_of).repeat_interleave(lengths)
        return scales[index.to(scales.device)]

    def _rows(self, w: Tensor) -> Tensor:
        if w.shape[0] != self.num_weights:
            raise ValueError(
                f"weights: expected {self.num_weights} rows, found {tuple(w.shape)}"
            )
        return w.mT


@register_stored_class
class DiagonalPrior(WeightPrior):
    """R = diag(scales) alpha^-1/2.

    Args:
        num_weights: D.
        precisions: alpha (G,).
        groups: See ``WeightPrior``.
        group_of: See ``WeightPrior``.
        scales: Standard deviations at precision one (D,). Default: one each.
    """

    def __init__(
        self,
        num_weights: int,
        precisions: Float[Tensor, " G"],
        groups: Sequence[slice] | None = None,
        group_of: Sequence[int] | None = None,
        *,
        scales: Float[Tensor, " D"] | None = None,
    ) -> None:
        super().__init__(num_weights, precisions, groups, group_of)
        self.scales = scales
        # One product per application, whatever the groups.
        scale = self._scale()
        self._diagonal = scale if scales is None else scales * scale

    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        return rows * self._diagonal

    def _rebuilt(
        self, precisions: Tensor, groups: Sequence[slice], group_of: Sequence[int]
    ) -> WeightPrior:
        return DiagonalPrior(
            self.num_weights, precisions, groups, group_of, scales=self.scales
        )


@register_stored_class
@dataclass(frozen=True)
class MatrixRoot:
    """Root over one weight matrix: X -> left (inner * X) right^T.

    A Kronecker product, when there is no ``inner``; with it also the sum of two, or
    any other covariance with Kronecker-factored eigenvectors.

    Attributes:
        left: (out, out), or the diagonal of one (out,).
        right: (rest, rest), or the diagonal of one (rest,).
        inner: Entrywise factors (out, rest), or none.
    """

    left: Tensor
    right: Tensor
    inner: Tensor | None = None

    def apply(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R x for each of k matrices."""
        x = x if self.inner is None else self.inner * x
        x = self.left[:, None] * x if self.left.ndim == 1 else self.left @ x
        return x * self.right if self.right.ndim == 1 else x @ self.right.mT

    def adjoint(self, x: Float[Tensor, "k out rest"]) -> Float[Tensor, "k out rest"]:
        """R^T x for each of k matrices."""
        x = self.left[:, None] * x if self.left.ndim == 1 else self.left.mT @ x
        x = x * self.right if self.right.ndim == 1 else x @ self.right
        return x if self.inner is None else self.inner * x


@register_stored_class
class KroneckerPrior(WeightPrior):
    """Each parameter tensor has a root of its own; R is block-diagonal.

    Args:
        num_weights: D.
        precisions: alpha (G,).
        groups: See ``WeightPrior``; parameter tensors are never split between groups.
        group_of: See ``WeightPrior``.
        blocks: For each parameter tensor, in order, its standard deviations (m,) or
            the root over its matrix.
    """

    def __init__(
        self,
        num_weights: int,
        precisions: Float[Tensor, " G"],
        groups: Sequence[slice] | None = None,
        group_of: Sequence[int] | None = None,
        *,
        blocks: Sequence[Tensor | MatrixRoot],
    ) -> None:
        super().__init__(num_weights, precisions, groups, group_of)
        self.blocks = tuple(blocks)
        sizes = [
            b.shape[0] if isinstance(b, Tensor) else b.left.shape[0] * b.right.shape[0]
            for b in self.blocks
        ]
        if sum(sizes) != num_weights:
            raise ValueError(
                f"blocks: expected {num_weights} weights in all, found {sum(sizes)}"
            )
        stops = torch.tensor(sizes).cumsum(0).tolist()
        self._slices = [
            slice(stop - n, stop) for n, stop in zip(sizes, stops, strict=True)
        ]
        self._factor = self._scale()

    def _apply(self, rows: Tensor, adjoint: bool) -> Tensor:
        found = torch.empty_like(rows, memory_format=torch.contiguous_format)
        for s, block in zip(self._slices, self.blocks, strict=True):
            x = rows[:, s]
            if isinstance(block, Tensor):
                found[:, s] = x * block
                continue
            x = x.reshape(-1, block.left.shape[0], block.right.shape[0])
            x = block.adjoint(x) if adjoint else block.apply(x)
            found[:, s] = x.reshape(rows.shape[0], -1)
        # Precisions are constant within a block, so they commute with its root.
        return found.mul_(self._factor)

    def _rebuilt(
        self, precisions: Tensor, groups: Sequence[slice], group_of: Sequence[int]
    ) -> WeightPrior:
        return KroneckerPrior(
            self.num_weights, precisions, groups, group_of, blocks=self.blocks
        )


def _check_partition(groups: Sequence[slice], num_weights: int) -> None:
    at = 0
    for s in groups:
        if s.start != at or s.stop <= at or s.step not in (None, 1):
            raise ValueError(
                f"groups: expected slices that partition 0..{num_weights} in order, "
                f"found {s} where {at} should start"
            )
        at = s.stop
    if at != num_weights:
        raise ValueError(f"groups: expected to end at {num_weights}, found {at}")
