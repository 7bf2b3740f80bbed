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
from gpytorch.kernels import (
    Kernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    SpectralMixtureKernel,
    keops,
)
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.slices import (
    check_product,
    check_width,
    recomputed,
    slices,
    tile_shape,
    tracks_gradient,
)
from sgdgp.features.base import FEATURES_AT_ONCE, FeatureMap
from sgdgp.features.dispatch import FeatureRequest, register_features

_TILE_CPU = 2**17
"""Entries of a tile of ``each``: its buffers (0.5 MB each in float32) stay in the
cache."""

_TILE = 2**23
"""Entries of a tile of ``each`` elsewhere: 32 MB in float32, so that few launches fill
a GPU."""

_ROWS = 128
"""Rows of a tile of ``each``, about: enough for fast products, and few enough to leave
room for a thousand frequencies beside them."""


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

    def features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n M"]:
        """All sines, then all cosines: (n, 2 m)."""
        self._check(x)
        phase = self._columns(x) @ self.frequencies
        return torch.cat([phase.sin(), phase.cos()], 1) * self._amplitude

    def forward(
        self, x: Float[Tensor, "n d"], w: Float[Tensor, "M s"]
    ) -> Float[Tensor, "n s"]:
        """phi(x) w, tile by tile; features are recomputed for gradients."""
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

    def adjoint(
        self, x: Float[Tensor, "n d"], v: Float[Tensor, "n s"]
    ) -> Float[Tensor, "M s"]:
        """phi(x)^T v, tile by tile; features are recomputed for gradients."""
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
        """The same frequencies with another variance."""
        return FourierFeatures(self.frequencies, variance * self.variance, self.dims)

    def restricted(self, dims: Int[Tensor, " k"]) -> FeatureMap:
        """The same frequencies for other columns."""
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
            x_rows = self._columns(x[rows])
            out.append(
                torch.stack(
                    [
                        recomputed(
                            _tile_forward,
                            x_rows,
                            self.frequencies[:, columns],
                            w[:m][columns],
                            w[m:][columns],
                        )
                        for columns in slices(m, width)
                    ]
                ).sum(0)
            )
        return torch.cat(out or [x.new_zeros(0, w.shape[1])]) * self._amplitude

    def _differentiable_adjoint(self, x: Tensor, v: Tensor) -> Tensor:
        m = self.frequencies.shape[1]
        height, width = tile_shape(x.shape[0], m, x.device)
        sines, cosines = [], []
        for columns in slices(m, width):
            total = torch.stack(
                [
                    recomputed(
                        _tile_adjoint,
                        self._columns(x[rows]),
                        self.frequencies[:, columns],
                        v[rows],
                    )
                    for rows in slices(x.shape[0], height)
                ]
            ).sum(0)
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


def _scaled(omega: Tensor, kernel: Kernel, request: FeatureRequest) -> FourierFeatures:
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    return FourierFeatures((omega / lengthscale).to(request.like))


@register_features(keops.RBFKernel)
@register_features(RBFKernel)
def rbf_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of exp(-r^2 / 2): standard normal over the lengthscales."""
    return _scaled(
        request.normal(request.dim, request.num_frequencies), kernel, request
    )


@register_features(keops.MaternKernel)
@register_features(MaternKernel)
def matern_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of the Matern kernel: multivariate Student t with 2 nu degrees.

    One chi-square variable divides the whole frequency vector. Independent
    Student t entries would instead give the product of one-dimensional Matern
    kernels, which is not the isotropic kernel in more than one dimension.
    """
    omega = request.normal(request.dim, request.num_frequencies)
    # chi-square with 2 nu degrees of freedom = 2 Gamma(nu, 1)
    chi2 = 2 * request.gamma(kernel.nu, request.num_frequencies)
    return _scaled(omega * (2 * kernel.nu / chi2).sqrt(), kernel, request)


@register_features(RQKernel)
def rational_quadratic_features(
    kernel: RQKernel, request: FeatureRequest
) -> FeatureMap:
    """Frequencies of (1 + r^2 / (2 alpha))^-alpha: a Gamma mixture of normals.

    The kernel is the mean of exp(-u r^2 / 2) over u ~ Gamma(alpha, rate alpha).
    """
    alpha = float(request.parameter(kernel.alpha))
    omega = request.normal(request.dim, request.num_frequencies)
    u = request.gamma(alpha, request.num_frequencies) / alpha
    return _scaled(omega * u.sqrt(), kernel, request)


@register_features(keops.PeriodicKernel)
@register_features(PeriodicKernel)
def periodic_features(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    r"""Frequencies of GPyTorch's exp(-2 sum_i sin^2(pi r_i / p_i) / l_i).

    With 2 sin^2(t / 2) = 1 - cos t each factor is exp((cos t_i - 1) / l_i),
    t_i = 2 pi r_i / p_i: the characteristic function of a difference of two
    Poisson(1 / (2 l_i)) variables (a Skellam variable), the harmonic's number.
    """
    shape = (request.dim, request.num_frequencies)
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    period = request.parameter(kernel.period_length).reshape(-1, 1)
    rate = (0.5 / lengthscale).expand(shape)
    harmonic = request.poisson(rate) - request.poisson(rate)
    return FourierFeatures((2 * math.pi * harmonic / period).to(request.like))


@register_features(SpectralMixtureKernel)
def spectral_mixture_features(
    kernel: SpectralMixtureKernel, request: FeatureRequest
) -> FeatureMap:
    """Frequencies of GPyTorch's spectral mixture: one mixture for each dimension.

    GPyTorch sums over the mixture inside the product over dimensions, so every
    dimension draws its own component and k(x, x) = (sum of weights)^d.
    """
    count = request.num_frequencies
    weights = request.parameter(kernel.mixture_weights).reshape(-1)
    means = request.parameter(kernel.mixture_means)[:, 0, :].T
    scales = request.parameter(kernel.mixture_scales)[:, 0, :].T
    component = torch.multinomial(
        weights, request.dim * count, replacement=True, generator=request.generator
    ).view(request.dim, count)
    sign = torch.where(request.uniform(request.dim, count) < 0.5, -1.0, 1.0)
    omega = sign * means.gather(1, component)
    omega = omega + scales.gather(1, component) * request.normal(request.dim, count)
    return FourierFeatures(
        (2 * math.pi * omega).to(request.like), float(weights.sum() ** request.dim)
    )
