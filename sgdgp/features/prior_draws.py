"""Prior function draws from random features."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.features.base import FeatureMap
from sgdgp.features.dispatch import random_features
from sgdgp.features.own_points import own_values

if TYPE_CHECKING:
    from gpytorch.kernels import Kernel


@dataclass(frozen=True, eq=False)
class DrawGroup:
    """Functions that share a feature map: f_k(x) = phi(x) w_k.

    Args:
        feature_map: phi.
        weights: (M, g), standard normal, one column for each function.
    """

    feature_map: FeatureMap
    weights: Float[Tensor, "M g"]

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n g"]:
        """The values of the functions at x."""
        return self.feature_map.forward(x, self.weights)

    def each(self, x: Float[Tensor, "g q d"]) -> Float[Tensor, "g q"]:
        """The values of every function at points of its own."""
        return own_values(self.feature_map, x, self.weights.mT.contiguous())

    def subset(self, index: Sequence[int]) -> DrawGroup:
        """The functions with these numbers, in this order."""
        # Stored column by column, as functions at points of their own read them.
        return replace(self, weights=self.weights.mT[list(index)].mT)


@dataclass(frozen=True, eq=False)
class PriorDraws:
    """A set of s functions drawn from a Gaussian process prior (zero mean).

    Calling it with x (n, d) gives (n, s): always the same functions, in bounded
    memory, differentiable in x.

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
        """Number of functions s."""
        return sum(group.weights.shape[1] for group in self.groups)

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n s"]:
        """Values of all functions at x (n, d), as (n, s)."""
        check_points(x, self.dim, self.dtype, self.device)
        if not self.groups:
            return x.new_zeros(x.shape[0], 0)
        return torch.cat([group(x) for group in self.groups], 1)

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Values of every function at points of its own, as (s, q)."""
        sizes = [group.weights.shape[1] for group in self.groups]
        parts = [
            group.each(own)
            for group, own in zip(self.groups, x.split(sizes), strict=True)
        ]
        return torch.cat(parts) if parts else x.new_zeros(x.shape[:2])

    def subset(self, index: Sequence[int]) -> PriorDraws:
        """The functions with these numbers, in this order."""
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
            :class:`~sgdgp.features.exact_draws.ExactDraws` may serve instead.
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
        size = min(group_size, num_samples - start)
        groups.append(
            DrawGroup(
                feature_map,
                _normal_columns(
                    feature_map.num_features, size, generator, dtype, device
                ),
            )
        )
    return PriorDraws(tuple(groups), dim, dtype, torch.device(device))


def _normal_columns(
    rows: int,
    columns: int,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Standard normals drawn column by column in float64.

    So the first columns depend neither on how many follow nor on the dtype.
    """
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    for k in range(columns):
        out[:, k] = torch.randn(
            rows, generator=generator, dtype=torch.float64, device=generator.device
        ).to(out)
    return out
