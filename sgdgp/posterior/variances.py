"""Posterior variances without most of the sampling error of sample functions.

Legend: u ~ N(0, H), H = K + Sigma: what a sample function is conditioned on; k_x =
k(X, x); V(x) the posterior variance.

A sample function deviates from the mean by a = f(x) - k_x^T H^-1 u, so that mean a^2
over S functions has a relative standard error of sqrt(2 / S). Condition instead on
few linear functionals of u whose covariance is known: the rows N most correlated with
x, and D^T u for directions D with known images Q = H D, D^T Q = I. With

    A = H_NN - Q_N Q_N^T,   r = k_N - Q_N D^T k_x,   w = A^-1 r,   v = D^T k_x - Q_N^T w

the deviation c = f(x) - w^T u_N - v^T D^T u has the variance

    C = k(x, x) - k_N^T w - (k_x^T D) v  >=  V(x),

exactly, and e = c - a = k_x^T H^-1 u - w^T u_N - v^T D^T u has no part in f(x) any
more: it is a functional of u, which a is independent of. So V = C - E e^2, whose
estimate from S functions is off by sqrt(2 / S) of the small E e^2 instead of V, and
asks nothing of the random features that f was drawn with. Where e is not small, the
best of both estimates is their mean by their inverse variances.

Neighbours alone are Vecchia's approximation (1988); here they are a control variate.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from gpytorch.kernels import Kernel
from gpytorch.kernels.kernel import to_dense
from jaxtyping import Float, Int
from torch import Tensor

from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.processes import Processes
from sgdgp.core.slices import tracks_gradient
from sgdgp.core.team import Found, alone, is_led, keep, together
from sgdgp.operators import FeatureOperator, KernelOperator
from sgdgp.operators.evaluation import (
    detached_copy,
    differentiable_block,
    evaluated_blocks,
)
from sgdgp.solvers.base import Factor
from sgdgp.solvers.cholesky import factorise_

EXACT_ROWS = 2_000
"""Rows up to which variances are exact: a factor of H takes a fraction of a second."""

NEIGHBOURS = 32
"""Rows N of each point. Half as many cost 1.5 times the error, twice as many four times
the time of their blocks (eight inputs, lengthscale 1, noise .01)."""

DIRECTIONS = 64
"""Directions D that all points share: the work of two passes of a solve with 64
functions. They see what is smooth; twice as many take off a quarter of the error."""

_SMALL = 0.1
"""Weight below which mean a^2 is not worth its random features: leaving it out makes
the standard error a twentieth larger."""

_FEATURES = 10.0
"""What a relative error of the functions' covariance does to E e^2, which is small
because much cancels: about this many times as much (measured with 512 features in two
and eight dimensions: 10 to 13)."""

_CORRELATIONS = 2**21
"""Entries of a block of correlations at a time: 32 MB in float64."""

_BLOCKS = 2**17
"""Entries of the small blocks that are factorised at a time: 64 MB in float64."""


class Explained(NamedTuple):
    """What functionals of the data say at points x.

    Attributes:
        bound: C (n',), never below the posterior variance.
        products: k_x^T W of all columns W (n', k).
        rest: e of all columns (n', k); None where everything is explained.
    """

    bound: Tensor
    products: Tensor
    rest: Tensor | None


class Variances(ABC):
    """What is known of variances, beside columns of weights W = H^-1 U (n, k)."""

    @abstractmethod
    def explain(self, x: Float[Tensor, "m p"]) -> Explained:
        """What is known at kernel inputs x, differentiable in x."""

    @abstractmethod
    def covariance(self, x: Float[Tensor, "*b m p"]) -> Float[Tensor, "*b m m"] | None:
        """Posterior covariances at kernel inputs x; None where they are not known."""


def are_exact(operator: KernelOperator) -> bool:
    """Whether variances and covariances given data at these rows are exact."""
    source = operator.streaming()
    rows = operator.shape[0]
    if isinstance(source, FeatureOperator):
        # An entry of K is a sum over features, of which a network has too many.
        rows = max(rows, source.features.num_features)
    return rows <= EXACT_ROWS


@outside_inference_mode
def variances_given(
    operator: KernelOperator,
    noise: Float[Tensor, " n"],
    weights: Float[Tensor, "n k"],
    factor: Factor | None = None,
) -> Variances:
    """Exact variances where a factor of H is cheap, and else what comes close.

    Args:
        operator: K (n, n).
        noise: The diagonal of Sigma (n,).
        weights: W = H^-1 U, as well as they were solved for.
        factor: Of H in float64, where there is one already.
    """
    if factor is not None and are_exact(operator):
        return ExactVariances(factor.operator, weights, factor.lower)
    given = ExactVariances if are_exact(operator) else PartialVariances
    with torch.no_grad():
        return given.prepare(operator, noise, weights)


def variance_of(
    bound: Float[Tensor, " m"],
    rest: Float[Tensor, "m s"] | None,
    deviations: Callable[[Int[Tensor, " r"]], Float[Tensor, "r s"]],
    covariance_error: float,
) -> tuple[Float[Tensor, " m"], Float[Tensor, " m"]]:
    """Posterior variances and their standard errors.

    Args:
        bound: C.
        rest: e of S functions; None where it is zero.
        deviations: a of the functions, at the points of these numbers.
        covariance_error: Relative error of the functions' prior covariance.
    """
    if rest is None:
        return bound, torch.zeros_like(bound)
    tiny = torch.finfo(bound.dtype).tiny
    explained = torch.minimum(rest.square().mean(1), bound)
    left = bound - explained
    share = explained / bound.clamp_min(tiny)
    weight = share.square() / (share.square() + (1 - share).square())
    weight = (weight - _SMALL).clamp_min(0) / (1 - _SMALL)
    rows = weight.nonzero().squeeze(1)
    error = (1 - weight) * explained
    if len(rows):
        squares = deviations(rows).square().mean(1)
        own = weight[rows]
        mixed = own * squares + (1 - own) * left[rows]
        left = left.index_put((rows,), torch.minimum(mixed, bound[rows]))
        error = error.index_put((rows,), torch.hypot(own * squares, error[rows]))
    relative = math.hypot((2 / rest.shape[1]) ** 0.5, _FEATURES * covariance_error)
    return left, relative * error


@dataclass(frozen=True, eq=False)
class ExactVariances(Variances):
    """All of u is conditioned on: V = k(x, x) - |L^-1 k_x|^2, L L^T = H.

    Attributes:
        operator: K in float64.
        weights: W (n, k).
        factor: L (n, n).
    """

    operator: KernelOperator
    weights: Tensor
    factor: Tensor

    @classmethod
    def prepare(
        cls, operator: KernelOperator, noise: Tensor, weights: Tensor
    ) -> ExactVariances:
        """Factorise H in float64."""
        wide = operator.streaming().to(torch.float64)
        everything = slice(0, len(noise))
        matrix = wide.block(everything, everything).clone()
        # Noise below rounding would decide nothing but whether there is a factor.
        floor = len(noise) * torch.finfo(torch.float64).eps * matrix.diagonal().max()
        matrix.diagonal().add_(noise.double().clamp_min(floor))
        if not factorise_(matrix):
            raise RuntimeError("K + Sigma is not positive definite in float64")
        return cls(wide, weights, matrix)

    def explain(self, x: Float[Tensor, "m p"]) -> Explained:
        parts = [self._explain(rows) for rows in x.split(_rows(len(self.factor)))]
        bounds, products = zip(*parts, strict=True)
        return Explained(torch.cat(bounds), torch.cat(products), None)

    def covariance(self, x: Float[Tensor, "*b m p"]) -> Float[Tensor, "*b m m"]:
        wide = x.double()
        blocks = wide.reshape(-1, *wide.shape[-2:])
        half = self._half(self._cross(blocks.flatten(0, 1)))
        half = half.reshape(len(half), len(blocks), -1).movedim(1, 0)
        if x.ndim > 2 and self._batched is not None:
            prior = differentiable_block(self._batched, blocks, blocks)
        else:
            kernel = self.operator.kernel
            prior = torch.stack([differentiable_block(kernel, b, b) for b in blocks])
        found = (prior - half.mT @ half).to(x.dtype)
        return found.reshape(*x.shape[:-2], *found.shape[1:])

    @cached_property
    def _batched(self) -> Kernel | None:
        return batched_kernel(self.operator)

    def _explain(self, x: Tensor) -> tuple[Tensor, Tensor]:
        wide = x.double()
        cross = self._cross(wide)
        prior = prior_variances(self.operator.kernel, wide)
        bound = _floored(prior - self._half(cross).square().sum(0), prior, x.dtype)
        return bound, cross.to(x.dtype) @ self.weights

    def _cross(self, x: Tensor) -> Tensor:
        """k_x^T (n', n)."""
        if tracks_gradient(x):
            return differentiable_block(self.operator.kernel, x, self.operator.x)
        cross = self.operator.cross(x)
        return cross.block(slice(0, cross.shape[0]), slice(0, cross.shape[1]))

    def _half(self, cross: Tensor) -> Tensor:
        """L^-1 k_x (n, n')."""
        return torch.linalg.solve_triangular(self.factor, cross.mT, upper=False)


@dataclass(frozen=True, eq=False)
class PartialVariances(Variances):
    """Some functionals of u are conditioned on: neighbours of x, and directions.

    Attributes:
        operator: K (n, n), streaming.
        kernel: Its kernel in float64, where it takes batches of points; else None, and
            there are no neighbours.
        noise: The diagonal of Sigma (n,).
        scale: 1 / sqrt(k(X_j, X_j)), which makes covariances correlations (n,).
        columns: [W | D] (n, k + g).
        images: H W (n, k): what W solves for exactly, whatever the tolerance was.
        direction_images: Q = H D (n, g).
        seen: D^T H W (g, k).
    """

    operator: KernelOperator
    kernel: Kernel | None
    noise: Tensor
    scale: Tensor
    columns: Tensor
    images: Tensor
    direction_images: Tensor
    seen: Tensor

    @classmethod
    def prepare(
        cls, operator: KernelOperator, noise: Tensor, weights: Tensor
    ) -> PartialVariances:
        """Find directions and all images, in one pass over K.

        D spans the columns of K at some rows: one power step from these, in which
        smooth functions dominate.
        """
        n, source = operator.shape[0], operator.streaming()
        generator = torch.Generator().manual_seed(0)
        some = torch.randperm(n, generator=generator, device=generator.device)
        some = some[:DIRECTIONS].to(noise.device)
        basis = torch.linalg.qr(source.block(slice(0, n), some)).Q
        columns = torch.cat([weights, basis], dim=1)
        # One pass: no reason to fill a matrix, which the posterior would keep.
        images = source.matmul(columns).addcmul_(noise.unsqueeze(1), columns)
        images, across = images.split([weights.shape[1], basis.shape[1]], dim=1)
        inner = basis.mT.double() @ across.double()
        values, vectors = torch.linalg.eigh(0.5 * (inner + inner.mT))
        # No eigenvalue of H is below the noise, but for rounding.
        turn = (vectors / values.clamp_min(noise.min()).sqrt()).to(basis.dtype)
        columns = torch.cat([weights, basis @ turn], dim=1)
        across = across @ turn
        several = operator.outputs_per_input > 1 or isinstance(source, FeatureOperator)
        return cls(
            source,
            None if several else batched_kernel(operator),
            noise,
            operator.diagonal().clamp_min(torch.finfo(noise.dtype).tiny).rsqrt(),
            columns,
            images,
            across,
            across.mT @ weights,
        )

    def explain(self, x: Float[Tensor, "m p"]) -> Explained:
        join = alone
        if is_led() and len(x) > 1 and not tracks_gradient(x):
            join = together
            keep(self)
        return Explained(*join(_explained, self, x))

    def _explain(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C (b,), k_x^T W (b, k), and of these what the functionals say."""
        if self.kernel is None:
            products, far = self._divided(self.operator.product_at(x, self.columns))
            prior = prior_variances(self.operator.kernel, x)
            bound = _floored(prior - far.square().sum(1), prior, x.dtype)
            return bound, products, far @ self.seen
        with torch.no_grad():
            cross = self.operator.cross(x.detach())
            block = cross.block(slice(0, len(x)), slice(0, len(self.noise)))
            product = block @ self.columns
            score = block.abs_().mul_(self.scale)
            count = min(NEIGHBOURS, len(self.noise))
            near = score.topk(count, dim=1, sorted=False).indices
        if tracks_gradient(x):
            product = self.operator.product_at(x, self.columns)
        products, far = self._divided(product)
        step = max(1, _BLOCKS // NEIGHBOURS**2)
        given = (part.split(step) for part in (x, near, far))
        parts = [self._regress(*some) for some in zip(*given, strict=True)]
        bounds, known = (torch.cat(part) for part in zip(*parts, strict=True))
        return bounds, products, known

    def _divided(self, product: Tensor) -> tuple[Tensor, ...]:
        """k_x^T W and k_x^T D."""
        return product.split(self.seen.shape[::-1], dim=1)

    def covariance(self, x: Float[Tensor, "*b m p"]) -> None:
        return None

    def _regress(self, x: Tensor, near: Tensor, far: Tensor) -> tuple[Tensor, Tensor]:
        """C (b,), and w^T u_N + v^T D^T u of all columns (b, k).

        Args:
            x: Points (b, p).
            near: Their rows N (b, m).
            far: D^T k_x (b, g).
        """
        points = torch.cat([self.operator.x[near], x.unsqueeze(1)], dim=1).double()
        block = differentiable_block(self.kernel, points, points)
        cross, prior = block[:, -1, :-1], block[:, -1, -1]
        shared, along = self.direction_images[near].double(), far.double()
        corner = torch.baddbmm(
            block[:, :-1, :-1].detach(), shared, shared.mT, alpha=-1.0
        )
        corner.diagonal(dim1=1, dim2=2).add_(self.noise[near].double())
        factor = _factors(corner, x.dtype)
        local = (cross - (shared @ along.unsqueeze(2)).squeeze(2)).unsqueeze(2)
        half = torch.linalg.solve_triangular(factor, local, upper=False)
        local = torch.linalg.solve_triangular(factor.mT, half, upper=True).squeeze(2)
        along = along - (shared.mT @ local.unsqueeze(2)).squeeze(2)
        bound = prior - (cross * local).sum(1) - (far.double() * along).sum(1)
        known = (local.to(x.dtype).unsqueeze(1) @ self.images[near]).squeeze(1)
        known = known + along.to(x.dtype) @ self.seen
        return _floored(bound, prior, x.dtype), known


def _explained(processes: Processes, variances: PartialVariances, x: Tensor) -> Found:
    """``Explained`` at a share of the points."""
    own = x[processes.rows(len(x))].split(_rows(len(variances.noise)))
    parts = zip(*(variances._explain(rows) for rows in own), strict=True)
    bounds, products, known = (torch.cat(part) for part in parts)
    return bounds, products, products - known


def prior_variances(kernel: Kernel, x: Float[Tensor, "m p"]) -> Float[Tensor, " m"]:
    """k(x, x), differentiable in x."""
    return to_dense(kernel(x, diag=True))


def batched_kernel(operator: KernelOperator) -> Kernel | None:
    """The operator's kernel in float64, if it takes batches of points."""
    some = torch.arange(4, device=operator.x.device) % len(operator.x)
    points = operator.x[some].double().reshape(2, 2, -1)
    blocks = evaluated_blocks(operator.kernel, points)
    if blocks is None:
        return None
    kernel = detached_copy(operator.kernel).double().requires_grad_(False)
    alone = differentiable_block(kernel, points[1], points[1])
    return kernel if torch.allclose(blocks[1], alone) else None


def _factors(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    """Cholesky factors (b, m, m), with what rounding asks for on the diagonal."""
    largest = blocks.diagonal(dim1=1, dim2=2).amax(1)
    jitter = 8 * torch.finfo(dtype).eps * largest
    blocks.diagonal(dim1=1, dim2=2).add_(jitter.unsqueeze(1))
    factors, failed = torch.linalg.cholesky_ex(blocks)
    if bool(failed.any()):
        # Near-duplicates, all but noiseless: their sum of entries is surely enough.
        rows = failed.nonzero().squeeze(1)
        again = blocks[rows]
        again.diagonal(dim1=1, dim2=2).add_(again.abs().sum(2))
        factors = factors.index_copy(0, rows, torch.linalg.cholesky(again))
    return factors


def _floored(bound: Tensor, prior: Tensor, dtype: torch.dtype) -> Tensor:
    """Variances in the dtype of the data, at least what it resolves of the prior's."""
    return torch.maximum(bound, torch.finfo(dtype).eps * prior.detach()).to(dtype)


def _rows(n: int) -> int:
    """Points at a time, whose correlations with n rows are held."""
    return max(1, _CORRELATIONS // n)
