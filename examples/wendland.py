"""A kernel of one's own: Wendland's function of compact support, all in one file.

    k(x, x') = (1 - r)^4 (4 r + 1) for r < 1 and 0 beyond, r = |(x - x') / l|

(Wendland, Advances in Computational Mathematics 1995: phi_{3,1}, a covariance in up to
three dimensions). Registered below, it has tiles with gradients, a formula for KeOps,
random features, and with these everything else: sums, products, posteriors, storage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from sgdgp.features import FeatureMap, FeatureRequest, FourierFeatures
from sgdgp.kernels import StationaryTile, register_kernel


class WendlandKernel(Kernel):
    """(1 - r)_+^4 (4 r + 1): twice differentiable, zero for r >= 1."""

    has_lengthscale = True
    is_stationary = True

    def forward(
        self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any
    ) -> Tensor:
        """K (n, m), or its diagonal (n,)."""
        if x1.shape[-1] > 3:
            raise ValueError(f"x: expected up to three columns, found {x1.shape[-1]}")
        x1, x2 = x1.div(self.lengthscale), x2.div(self.lengthscale)
        r = self.covar_dist(x1, x2, diag=diag, **params)
        return (1 - r).clamp_min(0) ** 4 * (4 * r + 1)


class WendlandTile(StationaryTile):
    """The same as a function of d2 = r^2; its derivative there is -10 (1 - r)_+^3."""

    derivative_scale = -10.0

    def profile(self, d2: Tensor, scratch: Sequence[Tensor]) -> None:
        r = d2.clamp_min_(0).sqrt_()
        left = torch.neg(r, out=scratch[0]).add_(1).clamp_min_(0)
        r.mul_(4).add_(1).mul_(left.pow_(4))

    def profile_with_derivative(
        self, d2: Tensor, derivative: Tensor, scratch: Tensor, same: Tensor
    ) -> None:
        r = d2.clamp_min_(0).sqrt_()
        left = torch.neg(r, out=scratch).add_(1).clamp_min_(0)
        torch.pow(left, 3, out=derivative)
        r.mul_(4).add_(1).mul_(derivative).mul_(left)

    def keops_profile(self, d2: Any) -> Any:
        r = d2.sqrt()
        return (1 - r).relu() ** 4 * (4 * r + 1)


def tile(kernel: WendlandKernel, dims: Tensor | None) -> WendlandTile:
    """The tile form, with the graph of the lengthscale."""
    return WendlandTile(1.0, dims, kernel.lengthscale[0].reciprocal())


def features(kernel: WendlandKernel, request: FeatureRequest) -> FeatureMap:
    """Frequencies of random direction, their lengths by inversion of the table."""
    lengths, cumulative = _spectrum(request.dim)
    u = request.uniform(request.num_frequencies).cpu().numpy()
    length = torch.from_numpy(np.interp(u, cumulative, lengths))
    direction = request.normal(request.dim, request.num_frequencies)
    omega = direction / direction.norm(dim=0) * length.to(direction)
    lengthscale = request.parameter(kernel.lengthscale).reshape(-1, 1)
    return FourierFeatures((omega / lengthscale).to(request.like))


@cache
def _spectrum(dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Lengths w of frequencies, and how probable one is that is not longer.

    The density of w is w^(d-1) times the transform of the kernel, the integral over r
    of k(r) r^(d-1) c(w r), with c the mean wave of all directions: the cosine, the
    Bessel function J_0, or sin(t) / t in one to three dimensions. It falls as w^-4, so
    that 1e-5 of it is cut off.
    """
    nodes, weights = np.polynomial.legendre.leggauss(200)
    r = torch.from_numpy((nodes + 1) / 2)
    kernel = (1 - r) ** 4 * (4 * r + 1) * r ** (dim - 1) * torch.from_numpy(weights)
    w = torch.linspace(0, 200, 4001, dtype=torch.float64)
    waves = (torch.cos, torch.special.bessel_j0, lambda t: torch.sinc(t / torch.pi))
    density = w ** (dim - 1) * (waves[dim - 1](w[:, None] * r) @ kernel)
    cumulative = torch.cumulative_trapezoid(density.clamp_min(0), w)
    cumulative = torch.cat([torch.zeros(1), cumulative / cumulative[-1]])
    return w.numpy(), cumulative.numpy()


register_kernel(WendlandKernel, tile=tile, features=features)
