"""The inducing-point objective: which rows, its gradient, its spectrum."""

from __future__ import annotations

import torch
from torch import Tensor

from sgdgp.operators.base import RowIndex
from sgdgp.solvers.primal import Shuffled, largest_eigenvalue

SPECTRUM_ROWS = 1000
"""Rows beside the inducing ones that stand for the rest in the spectrum."""

_CORRELATION = 0.99
_CHUNK = 256


class InducingProblem:
    """The inducing-point objective on a shuffled system.

    Args:
        data: The system and its blocks.
        points: Rows Z of the shuffled system (m,).
    """

    def __init__(self, data: Shuffled, points: Tensor) -> None:
        self._data = data
        self._points = points
        system = data.system
        self._kzz = system.operator.block(points, points)
        kernel_diagonal = system.operator.diagonal().unsqueeze(1)
        self._scale = (kernel_diagonal + system.noise)[points]
        self.target = torch.zeros_like(system.rhs[points])
        for block in data.blocks:
            rows = system.operator.block(block, points)
            self.target += rows.mT @ (system.rhs[block] / system.noise[block])
        self.passes = len(points) / system.n
        """Passes that one visit of all blocks costs, m / n."""

    def anchor(self, at: Tensor, gradient: Tensor) -> None:
        """Centre the estimator on a point (m, k) whose gradient is known."""
        self._anchor, self._at_anchor = at.clone(), gradient.clone()

    def gradient(self, block: RowIndex, at: Tensor) -> Tensor:
        """D^-1 g (m, k), the scaled stochastic gradient at weights (m, k)."""
        system = self._data.system
        rows = system.operator.block(block, self._points)
        step = at - self._anchor
        error = (rows @ step).div_(system.noise[block])
        gradient = (rows.mT @ error).mul_(len(self._data.blocks))
        return gradient.add_(self._kzz @ step).add_(self._at_anchor).div_(self._scale)

    def check(self, at: Tensor) -> tuple[Tensor, Tensor]:
        """Residual norms of the full system (k,), in float64, and the gradient."""
        system = self._data.system
        v = torch.zeros_like(system.rhs)
        v[self._points] = at
        squares = torch.zeros(at.shape[1], dtype=torch.float64, device=at.device)
        gradient = self._kzz @ at - self.target
        for block in self._data.blocks:
            rows = system.operator.block(block, self._points)
            product = rows @ at
            gradient += rows.mT @ (product / system.noise[block])
            residual = system.rhs[block].double() - product.double()
            residual -= system.noise[block].double() * v[block].double()
            squares += residual.square().sum(0)
        return squares.sqrt(), gradient

    def spectrum(self, generator: torch.Generator) -> tuple[float, float]:
        """lambda_1(B) scaled by D, and the mean noise of a row in its units.

        The inducing rows themselves are exact, a random subset stands for the rest.
        """
        system = self._data.system
        n, m = system.n, len(self._points)
        others = torch.ones(n, dtype=torch.bool, device=self._points.device)
        others[self._points] = False
        rest = others.nonzero()[:, 0]
        chosen = torch.randperm(
            len(rest), generator=generator, device=generator.device
        )[:SPECTRUM_ROWS]
        rest = rest[chosen.to(rest.device)]
        ratio = (n - m) / max(1, len(rest))
        scale = self._scale.rsqrt()
        kzz = self._kzz * scale * scale.mT
        # Rows scaled on the inducing side, weighted with their precision.
        inner = self._kzz * scale.mT / system.noise[self._points].sqrt()
        outer = system.operator.block(rest, self._points) * scale.mT
        outer = outer / system.noise[rest].sqrt()
        largest = largest_eigenvalue(
            lambda v: (
                kzz @ v + inner.mT @ (inner @ v) + ratio * (outer.mT @ (outer @ v))
            ),
            m,
            kzz,
            generator,
        )
        energy = inner.square().sum() + ratio * outer.square().sum()
        return largest, float(energy) / n


def choose_inducing(
    data: Shuffled, wanted: int | Tensor | None
) -> tuple[Tensor, float]:
    """Inducing rows of the shuffled system (m,), and the passes spent on them.

    Raises:
        ValueError: Rows are missing, repeated or out of range.
    """
    n = data.system.n
    if torch.is_tensor(wanted):
        return _given_rows(data, wanted), 0.0
    if wanted is None:
        wanted = min(max(512, n // 10), 8192)
    wanted = min(wanted, n)
    everything = torch.arange(n, device=data.order.device)
    candidates = torch.cat([everything[block] for block in data.blocks])
    operator = data.system.operator
    if wanted == n or operator.outputs_per_input != 1:
        return candidates[:wanted], 0.0
    scale = operator.diagonal().clamp_min(torch.finfo(operator.dtype).tiny).rsqrt()
    kept = candidates[:0]
    scanned = 0
    while len(kept) < wanted and scanned < n:
        chunk = candidates[scanned : scanned + _CHUNK]
        near = operator.block(chunk, torch.cat([kept, chunk]))
        near = near * scale[chunk].unsqueeze(1) * scale[torch.cat([kept, chunk])]
        close = near > _CORRELATION
        fresh = ~close[:, : len(kept)].any(1)
        within = close[:, len(kept) :].cpu()
        chosen: list[int] = []
        for row in fresh.nonzero()[:, 0].tolist():
            if not bool(within[row, chosen].any()):
                chosen.append(row)
        kept = torch.cat([kept, chunk[chosen]])
        scanned += len(chunk)
    return kept[:wanted], scanned * min(len(kept), wanted) / n**2


def _given_rows(data: Shuffled, rows: Tensor) -> Tensor:
    n = data.system.n
    if rows.ndim != 1 or rows.numel() == 0 or rows.is_floating_point():
        raise ValueError(
            "inducing: expected a count or integer row indices (m,), found "
            f"{rows.dtype} of shape {tuple(rows.shape)}"
        )
    rows = rows.to(data.order.device).long()
    if int(rows.min()) < 0 or int(rows.max()) >= n:
        raise ValueError(
            f"inducing: expected rows in [0, {n}), found {int(rows.min())} to "
            f"{int(rows.max())}"
        )
    if len(rows.unique()) != len(rows):
        raise ValueError("inducing: expected distinct rows, found repeated ones")
    position = torch.empty_like(data.order)
    position[data.order] = torch.arange(n, device=position.device)
    return position[rows]
