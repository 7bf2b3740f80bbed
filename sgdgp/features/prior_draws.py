"""Functions drawn from a Gaussian process prior.

By random features (``PriorDraws``), or exactly by Cholesky, revealed point by point
(``ExactDraws``), for kernels that have none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite
from sgdgp.core.codec import register_stored_class
from sgdgp.core.processes import Processes
from sgdgp.core.seeds import standard_normal
from sgdgp.core.slices import tracks_gradient
from sgdgp.core.team import Found, is_led, keep, together
from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import (
    NoRandomFeatures,
    check_parameters,
    part_without_features,
    random_features,
)

JITTERS = tuple(10.0**k for k in range(-10, -3))
"""Multiples of the mean prior variance that are tried on the diagonal, in order: from
the rounding of a covariance in float64 to what moves a value by 1 % of its scale."""

_SHARED_ROWS = 1024
"""Points from which other processes, where there are some, evaluate their share."""

_AT_ONCE = 16
"""Normals that PyTorch's CPU generator makes from as many uniforms: columns of a
multiple of it come out the same drawn together as one by one, in two thirds of the
time."""


class Draws(ABC):
    """A set of s functions drawn from a Gaussian process prior (zero mean).

    Calling it with x (n, d) gives (n, s), and always the same functions.
    """

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of functions s."""

    @abstractmethod
    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        """Values of all functions at x (n, d), as (n, s)."""

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Values of every function at points of its own, as (s, q)."""
        values = self(x.reshape(-1, x.shape[-1]))
        return values.reshape(*x.shape[:2], -1).diagonal(dim1=0, dim2=2).mT

    @property
    def covariance_error(self) -> float:
        """Relative error of the functions' covariance: of random features, else 0."""
        return 0.0

    @abstractmethod
    def subset(self, index: Sequence[int]) -> Draws:
        """The functions with these numbers, in this order; the same functions."""


@register_stored_class
@dataclass(frozen=True, eq=False)
class DrawGroup:
    """Functions that share a feature map: f_k(x) = phi(x) w_k.

    Args:
        feature_map: phi.
        weights: (M, g), standard normal, one column for each function.
    """

    feature_map: FeatureMap
    weights: Float[Tensor, "M g"]

    _drawn_from: ClassVar[Tensor | None] = None
    """State of the generator before the weights were drawn, where it is known."""

    @classmethod
    def drawn(
        cls, feature_map: FeatureMap, count: int, generator: torch.Generator, x: Tensor
    ) -> DrawGroup:
        """So many functions, of the dtype and on the device of x."""
        state = generator.get_state() if generator.device.type == "cpu" else None
        shape = feature_map.num_features, count
        group = cls(feature_map, _normal_columns(shape, generator, x))
        group.__dict__["_drawn_from"] = state
        return group

    def __getstate__(self) -> dict[str, Any]:
        """Pickles draw the weights again: they are larger than most data."""
        state = dict(self.__dict__)
        if self._drawn_from is not None:
            # The last row proves that the same was drawn.
            last = self.weights[-1:].clone()
            state["weights"] = tuple(self.weights.shape), last
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if isinstance(state["weights"], tuple):
            shape, last = state["weights"]
            generator = torch.Generator()
            generator.set_state(state["_drawn_from"])
            weights = _normal_columns(shape, generator, last)
            if not torch.allclose(weights[-1:], last):
                raise RuntimeError(
                    "this PyTorch draws other random numbers than the one that pickled "
                    "these functions; posterior.save keeps the functions themselves"
                )
            state = {**state, "weights": weights}
        self.__dict__.update(state)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n g"]:
        """The values of the functions at x."""
        return self.feature_map.forward(x, self.weights)

    def each(self, x: Float[Tensor, "g q d"]) -> Float[Tensor, "g q"]:
        """The values of every function at points of its own."""
        return self.feature_map.each(x, self.weights.mT.contiguous())

    def subset(self, index: Sequence[int]) -> DrawGroup:
        """The functions with these numbers, in this order."""
        # Stored column by column, as functions at points of their own read them.
        return replace(self, weights=self.weights.mT[list(index)].mT)


@register_stored_class
@dataclass(frozen=True, eq=False)
class PriorDraws(Draws):
    """Prior functions by feature maps: in bounded memory, differentiable in x.

    Args:
        groups: Sets of functions, each with its own feature map.
        dim: Number of columns of the inputs.
        dtype: Data type of inputs and values.
        device: Device of inputs and values.
    """

    groups: tuple[DrawGroup, ...]
    dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def num_samples(self) -> int:
        return sum(group.weights.shape[1] for group in self.groups)

    @property
    def covariance_error(self) -> float:
        maps = [group.feature_map for group in self.groups]
        inexact = sum(1 / each.num_features for each in maps if not each.exact)
        return inexact**0.5 / max(1, len(maps))

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        check_points(x, self.dim, self.dtype, self.device)
        if not self.groups:
            return x.new_zeros(x.shape[0], 0)
        if len(x) >= _SHARED_ROWS and is_led() and not tracks_gradient(x):
            keep(self)
            (values,) = together(_values, self, x)
            return values
        return torch.cat([group(x) for group in self.groups], 1)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        sizes = [group.weights.shape[1] for group in self.groups]
        parts = [
            group.each(own)
            for group, own in zip(self.groups, x.split(sizes), strict=True)
        ]
        return torch.cat(parts) if parts else x.new_zeros(x.shape[:2])

    def subset(self, index: Sequence[int]) -> PriorDraws:
        found: list[tuple[DrawGroup, list[int]]] = []
        for number in index:
            group, column = self._place(number)
            if found and found[-1][0] is group:
                found[-1][1].append(column)
            else:
                found.append((group, [column]))
        return replace(
            self, groups=tuple(group.subset(columns) for group, columns in found)
        )

    def _place(self, number: int) -> tuple[DrawGroup, int]:
        """The group of a function, and its column there."""
        for group in self.groups:
            if number < group.weights.shape[1]:
                return group, number
            number -= group.weights.shape[1]
        raise IndexError(f"expected a number below {self.num_samples}")

    def __iter__(self) -> Iterator[DrawGroup]:
        return iter(self.groups)


def _values(processes: Processes, draws: PriorDraws, x: Tensor) -> Found:
    """The functions at a share of the points."""
    return (draws(x[processes.rows(len(x))]),)


def check_points(x: Tensor, dim: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise unless x can be an argument of a set of draws.

    Raises:
        ValueError: If the shape or the device is wrong.
        TypeError: If the data type is wrong.
    """
    if x.ndim != 2 or x.shape[1] != dim:
        raise ValueError(f"x must have shape (n, {dim}), found shape {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"x must have dtype {dtype}, found {x.dtype}")
    if x.device.type != device.type:
        raise ValueError(f"x must be on {device}, found {x.device}")


def draw_prior(
    kernel: Kernel,
    num_samples: int,
    *,
    dim: int,
    num_features: int = 2048,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    group_size: int = 64,
) -> PriorDraws:
    """Draw functions from the prior GP(0, kernel) by random features.

    Every ``group_size`` functions have a feature map of their own, independent
    of the others. A map's error, of the order of 1 / sqrt(num_features), is
    common to its functions; over the groups it averages out.

    Args:
        kernel: A GPyTorch kernel with features (see :func:`random_features`).
        num_samples: Number of functions s; may be zero.
        dim: Number of columns of the inputs.
        num_features: Random features of each map. Default: 2048.
        generator: Source of all randomness. With the same seed and settings,
            more samples begin with the same functions.
        dtype: Data type of the functions. Default: float32.
        device: Device of the functions. Default: the CPU.
        group_size: Most functions that share a feature map. Default: 64.

    Returns:
        The functions, a callable on x (n, d) with values (n, s).

    Raises:
        NoRandomFeatures: If the kernel has no features;
            :class:`ExactDraws` may serve instead.
        ValueError: If a count is too small or does not fit the kernel.
    """
    check_count("num_samples", num_samples, 0)
    check_count("group_size", group_size, 1)
    groups = []
    for start in range(0, num_samples, group_size):
        feature_map = random_features(
            kernel,
            dim=dim,
            num_features=num_features,
            generator=generator,
            dtype=dtype,
            device=device,
        )
        like = torch.empty(0, dtype=dtype, device=device)
        count = min(group_size, num_samples - start)
        groups.append(DrawGroup.drawn(feature_map, count, generator, like))
    return PriorDraws(tuple(groups), dim, dtype, torch.device(device))


def _normal_columns(
    shape: tuple[int, int], generator: torch.Generator, like: Tensor
) -> Tensor:
    """Standard normals drawn column by column in float64.

    So the first columns depend neither on how many follow nor on the dtype.
    """
    rows, columns = shape
    if rows % _AT_ONCE == 0 and generator.device.type == "cpu":
        draws = torch.randn(
            columns,
            rows,
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        return draws.to(like).mT.contiguous()
    out = like.new_empty(shape)
    for k in range(columns):
        out[:, k] = torch.randn(
            rows, generator=generator, dtype=torch.float64, device=generator.device
        )
    return out


@register_stored_class
class ExactDraws(Draws):
    """Functions drawn from GP(0, kernel), exact at every finite set.

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
        # On the CPU, so that a seed means the same functions on every device.
        self._generator = torch.Generator().manual_seed(int(seed))
        self._index: dict[bytes, int] = {}
        self._points = x.new_zeros(0, self.dim, dtype=torch.float64)
        self._factor = self._points.new_zeros(0, 0)
        self._normals = self._points.new_zeros(0, num_samples)
        self._values = self._points.new_zeros(0, num_samples)
        self(x)

    @property
    def num_samples(self) -> int:
        return self._values.shape[1]

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
            order = [self._index[key] for key in keys]
            return self._values[order].to(self.dtype)

    def subset(self, index: Sequence[int]) -> SelectedDraws:
        return SelectedDraws(self, tuple(index))

    def stored_parts(self) -> dict[str, Any]:
        """What a file needs to know to reveal the same functions further."""
        return {
            "kernel": self._kernel,
            "num_samples": self.num_samples,
            "dtype": self.dtype,
            "max_points": self.max_points,
            "points": self._points,
            "factor": self._factor,
            "normals": self._normals,
            "values": self._values,
            "generator": self._generator.get_state(),
        }

    @classmethod
    def from_stored_parts(
        cls,
        kernel: Kernel,
        num_samples: int,
        dtype: torch.dtype,
        max_points: int,
        points: Float[Tensor, "n d"],
        factor: Float[Tensor, "n n"],
        normals: Float[Tensor, "n s"],
        values: Float[Tensor, "n s"],
        generator: Tensor,
    ) -> ExactDraws:
        """The draws behind ``stored_parts``."""
        nothing = points.new_empty(0, points.shape[1], dtype=dtype)
        draws = cls(
            kernel,
            num_samples,
            nothing,
            generator=torch.Generator(),
            max_points=max_points,
        )
        draws._points, draws._factor = points, factor
        draws._normals, draws._values = normals, values
        state, own = generator.cpu(), draws._generator
        if state.numel() == own.get_state().numel():
            own.set_state(state)
        else:  # of a GPU, by version 0.1.0: what is revealed later is drawn anew
            own.manual_seed(int.from_bytes(state.numpy().tobytes()[:7]))
        rows = points.cpu().numpy()
        draws._index = {row.tobytes(): i for i, row in enumerate(rows)}
        return draws

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
        normals = standard_normal(
            count, self.num_samples, like=points, generator=self._generator
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
class SelectedDraws(Draws):
    """Some functions of exact draws; all of them remember what one has visited.

    Args:
        draws: All functions.
        index: Numbers of these.
    """

    draws: ExactDraws
    index: tuple[int, ...]

    @property
    def num_samples(self) -> int:
        return len(self.index)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        return self.draws(x)[:, list(self.index)]

    def subset(self, index: Sequence[int]) -> SelectedDraws:
        """The functions with these numbers among these."""
        return SelectedDraws(self.draws, tuple(self.index[i] for i in index))


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
