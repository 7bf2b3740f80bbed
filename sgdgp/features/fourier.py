"""Random Fourier features of stationary kernels, as sine and cosine pairs.

For functions at points of their own, the gradient of sum_j (a_j sin t_j + b_j cos t_j),
t = x Omega, is (a_j cos t_j - b_j sin t_j) Omega^T: with the sines and cosines at hand
it costs one more product, so that values and gradients are found in one sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.codec import register_stored_class
from sgdgp.core.slices import (
    check_product,
    check_width,
    recomputed,
    slices,
    tile_shape,
    tracks_gradient,
)
from sgdgp.features.base import (
    FEATURES_AT_ONCE,
    FeatureMap,
    Features,
    Points,
    Values,
    Weights,
)

_TILE_CPU = 2**17
"""Entries of a tile of ``each``: its buffers (0.5 MB each in float32) stay in the
cache."""

_TILE = 2**23
"""Entries of a tile of ``each`` elsewhere: 32 MB in float32, so that few launches fill
a GPU."""

_ROWS = 128
"""Rows of a tile of ``each``, about: enough for fast products, and few enough to leave
room for a thousand frequencies beside them."""


@register_stored_class
class FourierFeatures(FeatureMap):
    r"""phi(x) = sqrt(v / m) [sin(x^T w_j), cos(x^T w_j)]_j for m frequencies w_j.

    By Bochner's theorem a stationary kernel v k(x - x'), k(0) = 1, is the mean
    of v cos((x - x')^T w) over its spectral distribution, and one sine and
    cosine pair is exactly that cosine: phi(x)^T phi(x) = v without error, and
    phi(x)^T phi(x') has standard error at most v / sqrt(2 m) for kernels whose
    frequencies are spread out (Rahimi & Recht 2007; Sutherland & Schneider 2015
    on pairs against phase shifts).

    The products never store more than two tiles of features (4 MB in float32 on
    a CPU, 32 MB on a GPU) besides inputs and outputs.

    Args:
        frequencies: (k, m), one column for each pair.
        variance: k(x, x) = v. Default: 1.
        dims: The k columns of x that the frequencies belong to. Default: all.
    """

    exact = False

    def __init__(
        self,
        frequencies: Float[Tensor, "k m"],
        variance: float = 1.0,
        dims: Int[Tensor, " k"] | None = None,
    ) -> None:
        self.frequencies = frequencies
        self.variance = float(variance)
        self.dims = dims
        self.num_features = 2 * frequencies.shape[1]

    @property
    def _amplitude(self) -> float:
        return math.sqrt(self.variance / self.frequencies.shape[1])

    def _columns(self, x: Tensor) -> Tensor:
        return x if self.dims is None else x.index_select(1, self.dims)

    def features(self, x: Points) -> Features:
        """All sines, then all cosines: (n, 2 m)."""
        self._check(x)
        phase = self._columns(x) @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1) * self._amplitude

    def forward(self, x: Points, w: Weights) -> Values:
        self._check(x)
        check_product("w", w, self.num_features)
        if tracks_gradient(x, w):
            return self._differentiable_forward(x, w)
        m = self.frequencies.shape[1]
        w = w.detach()
        out = x.new_zeros(x.shape[0], w.shape[1])
        for rows, columns, sin, cos in self._tiles(x):
            out[rows].addmm_(sin, w[:m][columns]).addmm_(cos, w[m:][columns])
        return out.mul_(self._amplitude)

    def adjoint(self, x: Points, v: Values) -> Weights:
        self._check(x)
        check_product("v", v, x.shape[0])
        if tracks_gradient(x, v):
            return self._differentiable_adjoint(x, v)
        m = self.frequencies.shape[1]
        v = v.detach()
        out = x.new_zeros(self.num_features, v.shape[1])
        for rows, columns, sin, cos in self._tiles(x):
            out[:m][columns].addmm_(sin.T, v[rows])
            out[m:][columns].addmm_(cos.T, v[rows])
        return out.mul_(self._amplitude)

    def each(
        self, x: Float[Tensor, "g q d"], weights: Float[Tensor, "g M"]
    ) -> Float[Tensor, "g q"]:
        """phi(x_i) w_i, and where x requires a gradient that too, in one sweep."""
        if self.dims is not None:
            x = x[..., self.dims]
        return _Waves.apply(self, x, weights, tracks_gradient(x))

    def scaled(self, variance: float) -> FeatureMap:
        return FourierFeatures(self.frequencies, variance * self.variance, self.dims)

    def restricted(self, dims: Tensor) -> FeatureMap:
        inner = dims if self.dims is None else dims[self.dims]
        return FourierFeatures(self.frequencies, self.variance, inner)

    def _check(self, x: Tensor) -> None:
        if self.dims is None:
            check_width(x, self.frequencies.shape[0])

    def _tiles(self, x: Tensor) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
        """(rows, columns, sines, cosines); the last two are overwritten each time."""
        x = x.detach()
        m = self.frequencies.shape[1]
        height, width = tile_shape(x.shape[0], m, x.device)
        first, second = x.new_empty(height * width), x.new_empty(height * width)
        for rows in slices(x.shape[0], height):
            x_rows = self._columns(x[rows])
            for columns in slices(m, width):
                shape = (x_rows.shape[0], columns.stop - columns.start)
                size = shape[0] * shape[1]
                phase, cos = first[:size].view(shape), second[:size].view(shape)
                torch.mm(x_rows, self.frequencies[:, columns], out=phase)
                torch.cos(phase, out=cos)
                yield rows, columns, phase.sin_(), cos

    def _differentiable_forward(self, x: Tensor, w: Tensor) -> Tensor:
        m = self.frequencies.shape[1]
        height, width = tile_shape(x.shape[0], m, x.device)
        out = []
        for rows in slices(x.shape[0], height):
            own, f = self._columns(x[rows]), self.frequencies
            tiles = [
                recomputed(_tile_forward, own, f[:, part], w[:m][part], w[m:][part])
                for part in slices(m, width)
            ]
            out.append(torch.stack(tiles).sum(0))
        return torch.cat(out or [x.new_zeros(0, w.shape[1])]) * self._amplitude

    def _differentiable_adjoint(self, x: Tensor, v: Tensor) -> Tensor:
        m = self.frequencies.shape[1]
        height, width = tile_shape(x.shape[0], m, x.device)
        sines, cosines = [], []
        for columns in slices(m, width):
            part = self.frequencies[:, columns]
            tiles = [
                recomputed(_tile_adjoint, self._columns(x[rows]), part, v[rows])
                for rows in slices(x.shape[0], height)
            ]
            total = torch.stack(tiles).sum(0)
            sines.append(total[0])
            cosines.append(total[1])
        return torch.cat(sines + cosines) * self._amplitude


def _tile_forward(
    x: Tensor, frequencies: Tensor, w_sin: Tensor, w_cos: Tensor
) -> Tensor:
    phase = x @ frequencies
    return phase.sin() @ w_sin + phase.cos() @ w_cos


def _tile_adjoint(x: Tensor, frequencies: Tensor, v: Tensor) -> Tensor:
    phase = x @ frequencies
    return torch.stack([phase.sin().T @ v, phase.cos().T @ v])


class _Waves(torch.autograd.Function):
    """Values and gradients of sines and cosines in one sweep."""

    @staticmethod
    def forward(ctx, feature_map, x, weights, wanted):  # type: ignore[no-untyped-def]
        amplitude = (feature_map.variance / feature_map.frequencies.shape[1]) ** 0.5
        frequencies = feature_map.frequencies
        values, slopes = _sweep(frequencies, x.detach(), weights, wanted=wanted)
        if wanted:
            ctx.frequencies, ctx.amplitude = frequencies, amplitude
            ctx.save_for_backward(x, weights, slopes.mul_(amplitude))
        return values.mul_(amplitude)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, weights, slopes = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return None, grad.unsqueeze(-1) * slopes, None, None
        # Somebody differentiates the gradient: this one has a graph.
        function = partial(_written_out, frequencies=ctx.frequencies)
        again = x.view_as(x)
        at_once = max(1, FEATURES_AT_ONCE // max(1, x.shape[1] * weights.shape[1]))
        parts = [
            recomputed(function, again[rows], weights[rows])
            for rows in slices(len(x), at_once)
        ]
        values = torch.cat(parts) * ctx.amplitude
        (found,) = torch.autograd.grad(values, again, grad, create_graph=True)
        return None, found, None, None


def _written_out(x: Tensor, weights: Tensor, frequencies: Tensor) -> Tensor:
    phase = x @ frequencies
    waves = torch.cat([phase.sin(), phase.cos()], -1)
    return (waves @ weights.unsqueeze(-1)).squeeze(-1)


def _sweep(
    frequencies: Tensor, x: Tensor, weights: Tensor, *, wanted: bool
) -> tuple[Tensor, Tensor]:
    """Values (g, q) and, if wanted, slopes (g, q, d), without the amplitude."""
    count, own, dim = x.shape
    m = frequencies.shape[1]
    values, slopes = x.new_zeros(count, own), x.new_zeros(dim, count * own)
    at_once = max(1, min(count, _ROWS // max(1, own)))
    entries = _TILE_CPU if x.device.type == "cpu" else _TILE
    step = max(1, min(m, entries // max(1, at_once * own)))
    buffers = x.new_empty(4, at_once * own * step)
    for rows in slices(count, at_once):
        flat = x[rows].reshape(-1, dim)
        total = values[rows].unsqueeze(-1)
        slope = slopes[:, rows.start * own : rows.stop * own]
        for cut in slices(m, step):
            shape = (len(flat), cut.stop - cut.start)
            phase, sin, cos, scratch = (
                buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers
            )
            torch.mm(flat, frequencies[:, cut], out=phase)
            torch.sin(phase, out=sin)
            torch.cos(phase, out=cos)
            grouped = (-1, own, shape[1])
            first = weights[rows, :m][:, cut].unsqueeze(1)
            second = weights[rows, m:][:, cut].unsqueeze(1)
            sin, cos = sin.view(grouped), cos.view(grouped)
            total.baddbmm_(sin, first.mT).baddbmm_(cos, second.mT)
            if wanted:
                derivative = torch.mul(cos, first, out=scratch.view(grouped))
                derivative.addcmul_(sin, second, value=-1.0)
                slope.addmm_(frequencies[:, cut], scratch.mT)
    return values, slopes.mT.reshape(count, own, dim)
