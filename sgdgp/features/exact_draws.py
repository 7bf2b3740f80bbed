"""Exact prior draws by Cholesky, revealed point by point."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite
from sgdgp.features.dispatch import (
    NoRandomFeatures,
    check_parameters,
    part_without_features,
)
from sgdgp.features.prior_draws import check_points

if TYPE_CHECKING:
    from gpytorch.kernels import Kernel

JITTERS = tuple(10.0**k for k in range(-10, -3))
"""Multiples of the mean prior variance that are tried on the diagonal, in order."""


class ExactDraws:
    """A set of s functions drawn from GP(0, kernel), exact at every finite set.

    The functions are revealed as they are asked for: every new batch of points
    is drawn from its distribution given all points visited before, by extending
    the lower Cholesky factor L of the visited points' covariance; the values are
    f = L z with standard normal z. A visited point keeps its values. Which
    function one gets depends on the order of the visits, its distribution does
    not.

    All arithmetic is in float64. Points that a kernel cannot tell apart make the
    covariance singular, so 1e-10 times the mean prior variance is added to the
    diagonal of each new batch, or ten times more until the factorisation
    succeeds, up to 1e-4.

    N visited points keep 8 N^2 bytes (0.8 GB at the default limit) and take about
    four times that while a batch is added; the time is N^3 / 3 operations.

    Args:
        kernel: Any GPyTorch kernel without batch shape that is a function of two
            points. It is copied: later changes do not reach the draws.
        num_samples: Number of functions s.
        x: Points to visit at once, normally the training inputs (n, d).
        generator: Source of randomness. One number is drawn from it here; later
            visits do not advance it.
        max_points: Most points that can be visited. Default: 10000.

    Raises:
        NoRandomFeatures: If more points than ``max_points`` are asked for.
        ValueError: If an argument has a wrong shape or value.
    """

    def __init__(
        self,
        kernel: Kernel,
        num_samples: int,
        x: Float[Tensor, "n d"],
        *,
        generator: torch.Generator,
        max_points: int = 10_000,
    ) -> None:
        check_count("num_samples", num_samples, 0)
        if x.ndim != 2:
            raise ValueError(f"x must have shape (n, d), found {tuple(x.shape)}")
        check_parameters(kernel)
        self.num_samples = num_samples
        self.dtype = x.dtype
        self.device = x.device
        self.dim = x.shape[1]
        self.max_points = max_points
        self._refuse_above_limit(x.shape[0], kernel)
        self._kernel = deepcopy(kernel).to(torch.float64).requires_grad_(False)
        # A generator of its own: values must not depend on what else is drawn
        # between two visits.
        seed = torch.randint(
            2**62, (1,), generator=generator, device=generator.device
        ).item()
        self._generator = torch.Generator(self.device).manual_seed(int(seed))
        self._index: dict[bytes, int] = {}
        self._points = x.new_zeros(0, self.dim, dtype=torch.float64)
        self._factor = self._points.new_zeros(0, 0)
        self._normals = self._points.new_zeros(0, num_samples)
        self._values = self._points.new_zeros(0, num_samples)
        self(x)

    @property
    def num_points(self) -> int:
        """Number of distinct points visited so far."""
        return self._points.shape[0]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        """Values of all functions at x (n, d), as (n, s).

        Raises:
            ValueError: If x requires a gradient, has a wrong shape or device, or
                an entry that is not finite.
            NoRandomFeatures: If the limit on visited points would be exceeded.
            torch.linalg.LinAlgError: If the covariance is not positive definite
                with the largest jitter.
        """
        if x.requires_grad:
            raise ValueError(
                "x requires a gradient, but exact draws are revealed point by point "
                "and have no closed-form gradient in x; pass x.detach(), or register "
                "random features for the kernel, which are differentiable"
            )
        check_points(x, self.dim, self.dtype, self.device)
        check_finite("x", x)
        with torch.no_grad():
            # Adding zero makes a negative zero equal to a positive one, in bytes too.
            points = x.to(torch.float64) + 0.0
            keys = [row.tobytes() for row in points.cpu().numpy()]
            new: dict[bytes, int] = {}
            for position, key in enumerate(keys):
                if key not in self._index:
                    new.setdefault(key, position)
            if new:
                self._refuse_above_limit(self.num_points + len(new), self._kernel)
                start = self.num_points
                self._reveal(points[list(new.values())])
                self._index.update({key: start + i for i, key in enumerate(new)})
            order = torch.tensor([self._index[key] for key in keys], dtype=torch.long)
            return self._values[order.to(self.device)].to(self.dtype)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Values of every function at points of its own, as (s, q)."""
        return own_values(self, x)

    def subset(self, index: Sequence[int]) -> SelectedDraws:
        """The functions with these numbers, in this order; the same functions."""
        return SelectedDraws(self, tuple(index))

    def _reveal(self, points: Tensor) -> None:
        """Extend L by the rows [A^T, chol(C)] of the new points, and f by theirs."""
        old, count = self.num_points, points.shape[0]
        covariance = self._covariance(points, points)
        scale = float(covariance.diagonal().mean()) or 1.0
        below = torch.linalg.solve_triangular(
            self._factor, self._covariance(self._points, points), upper=False
        )
        covariance.addmm_(below.T, below, alpha=-1)
        corner = _cholesky(covariance, scale)
        normals = torch.randn(
            count,
            self.num_samples,
            dtype=torch.float64,
            device=self.device,
            generator=self._generator,
        )
        values = below.T @ self._normals + corner @ normals
        if old:
            factor = self._factor.new_zeros(old + count, old + count)
            factor[:old, :old] = self._factor
            factor[old:, :old] = below.T
            factor[old:, old:] = corner
            self._factor = factor
        else:
            self._factor = corner
        self._points = torch.cat([self._points, points])
        self._normals = torch.cat([self._normals, normals])
        self._values = torch.cat([self._values, values])

    def _covariance(self, a: Tensor, b: Tensor) -> Tensor:
        if not (len(a) and len(b)):
            return a.new_zeros(len(a), len(b))
        # A copy, for kernels that return an expanded tensor; it is updated in place.
        return self._kernel(a, b).to_dense().detach().clone()

    def _refuse_above_limit(self, count: int, kernel: Kernel) -> None:
        if count > self.max_points:
            raise NoRandomFeatures(
                part_without_features(kernel) or kernel,
                f"would need exact draws at {count} points, more than "
                f"max_points={self.max_points}",
            )


@dataclass(frozen=True, eq=False)
class SelectedDraws:
    """Some functions of exact draws; all of them remember what one has visited.

    Args:
        draws: All functions.
        index: Numbers of these.
    """

    draws: ExactDraws
    index: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        """Number of functions."""
        return len(self.index)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        """Values of these functions at x (n, d), as (n, s)."""
        return self.draws(x)[:, list(self.index)]

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Values of every function at points of its own, as (s, q)."""
        return own_values(self, x)

    def subset(self, index: Sequence[int]) -> SelectedDraws:
        """The functions with these numbers among these."""
        return SelectedDraws(self.draws, tuple(self.index[i] for i in index))


def own_values(
    draws: ExactDraws | SelectedDraws, x: Float[Tensor, "s q d"]
) -> Float[Tensor, "s q"]:
    """The diagonal of all functions at all points."""
    values = draws(x.reshape(-1, x.shape[-1]))
    return values.reshape(*x.shape[:2], -1).diagonal(dim1=0, dim2=2).mT


def _cholesky(covariance: Tensor, scale: float) -> Tensor:
    """Lower factor of a conditional covariance, with the smallest jitter that works."""
    diagonal = covariance.diagonal()
    exact = diagonal.clone()
    for jitter in JITTERS:
        diagonal.copy_(exact + jitter * scale)
        factor, info = torch.linalg.cholesky_ex(covariance)
        if not info.any():
            return factor
    raise torch.linalg.LinAlgError(
        f"the prior covariance of {len(covariance)} points is not positive definite "
        f"even with {JITTERS[-1]:g} of the mean variance added to its diagonal; "
        "is the kernel positive definite?"
    )
