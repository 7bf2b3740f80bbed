"""Random Fourier features of stationary kernels, as sine and cosine pairs."""

from __future__ import annotations

import math
from collections.abc import Iterator

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
from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import FeatureRequest, register_features


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
