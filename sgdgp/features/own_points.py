"""phi(x_i) w_i of every function i at points of its own, and its gradient in x.

For Fourier features the gradient of sum_j (a_j sin t_j + b_j cos t_j), t = x Omega, is
(a_j cos t_j - b_j sin t_j) Omega^T: with the sines and cosines at hand it costs one
more product, so that both are found in one sweep.
"""

from __future__ import annotations

from functools import partial, singledispatch

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.slices import recomputed, slices, tracks_gradient
from sgdgp.features.base import FeatureMap
from sgdgp.features.composite import RestrictedFeatures, ScaledFeatures, SumFeatures
from sgdgp.features.fourier import FourierFeatures

_FEATURES = 2**21
"""Features held at once."""

_TILE_CPU = 2**17
"""Entries of a tile: the five buffers of one stay in the cache."""

_TILE = 2**23
"""Entries of a tile elsewhere."""

_ROWS = 128
"""Rows of a tile, about."""


@singledispatch
def own_values(
    feature_map: FeatureMap, x: Float[Tensor, "g q d"], weights: Float[Tensor, "g M"]
) -> Float[Tensor, "g q"]:
    """The values of g functions, each at points of its own, differentiable in x.

    Args:
        feature_map: phi, the same for all of them.
        x: Points of each function (g, q, d).
        weights: One row for each function (g, M).
    """
    count, own, dim = x.shape
    at_once = max(1, _FEATURES // max(1, own * weights.shape[1]))

    def values(part: Tensor, rows: Tensor) -> Tensor:
        phi = feature_map.features(part.reshape(-1, dim))
        phi = phi.view(*part.shape[:2], rows.shape[1])
        return (phi @ rows.unsqueeze(-1)).squeeze(-1)

    parts = [
        recomputed(values, x[rows], weights[rows]) for rows in slices(count, at_once)
    ]
    return torch.cat(parts) if parts else x.new_zeros(count, own)


@own_values.register
def _(feature_map: ScaledFeatures, x: Tensor, weights: Tensor) -> Tensor:
    return own_values(feature_map.base, x, weights) * feature_map.variance**0.5


@own_values.register
def _(feature_map: RestrictedFeatures, x: Tensor, weights: Tensor) -> Tensor:
    return own_values(feature_map.base, x[..., feature_map.dims], weights)


@own_values.register
def _(feature_map: SumFeatures, x: Tensor, weights: Tensor) -> Tensor:
    first, *rest = (
        own_values(part, x, rows)
        for part, rows in zip(
            feature_map.parts, weights.split(feature_map.sizes, 1), strict=True
        )
    )
    return sum(rest, start=first)


@own_values.register
def _(feature_map: FourierFeatures, x: Tensor, weights: Tensor) -> Tensor:
    if feature_map.dims is not None:
        x = x[..., feature_map.dims]
    wanted = tracks_gradient(x)
    return _Waves.apply(feature_map, x, weights, wanted)


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
        at_once = max(1, _FEATURES // max(1, x.shape[1] * weights.shape[1]))
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
