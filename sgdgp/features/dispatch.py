"""From a GPyTorch kernel to a feature map, and how to teach it a new kernel."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite_parameters
from sgdgp.core.errors import SgdgpError
from sgdgp.features.base import FeatureMap


class NoRandomFeatures(SgdgpError, NotImplementedError):
    """A kernel has no feature map, or none of a usable size.

    Args:
        kernel: The kernel, or the part of one, that has none.
        reason: Why, as a clause that follows the kernel's name.
    """

    def __init__(
        self, kernel: Kernel, reason: str = "has no registered feature map"
    ) -> None:
        self.kernel_name = type(kernel).__name__
        super().__init__(f"{self.kernel_name} {reason}. {how_to_register(kernel)}")


def how_to_register(kernel: Kernel) -> str:
    """A sentence and a code example that show how to give ``kernel`` features."""
    name = type(kernel).__name__
    return (
        "Register features with E[phi(x)^T phi(x')] = k(x, x') for it:\n\n"
        "    from sgdgp.features import FourierFeatures, register_features\n\n"
        f"    @register_features({name})\n"
        "    def _(kernel, request):  # here for a stationary kernel with k(x, x) = 1\n"
        "        frequencies = ...    # (request.dim, request.num_frequencies), drawn\n"
        "                             # from the kernel's spectral density\n"
        "        return FourierFeatures(frequencies.to(request.like))\n"
    )


@dataclass(frozen=True)
class FeatureRequest:
    """What a builder of features is asked for.

    Args:
        dim: Number of columns of the inputs that the kernel sees, that is after
            its own ``active_dims``.
        num_features: Number of random features; exact maps have as many as
            they need.
        generator: Source of all randomness.
        dtype: Data type of the map.
        device: Device of the map.
    """

    dim: int
    num_features: int
    generator: torch.Generator
    dtype: torch.dtype
    device: torch.device

    @property
    def num_frequencies(self) -> int:
        """Sine and cosine pairs: half of the features, rounded up."""
        return (self.num_features + 1) // 2

    @property
    def like(self) -> Tensor:
        """An empty tensor of the wanted data type and device, for ``Tensor.to``."""
        return torch.empty(0, dtype=self.dtype, device=self.device)

    @property
    def _draws(self) -> dict[str, object]:
        # Always float64, so that one seed means one function in either precision.
        return {"dtype": torch.float64, "device": self.generator.device}

    def normal(self, *shape: int) -> Tensor:
        """Standard normal draws in float64 on the generator's device."""
        return torch.randn(*shape, generator=self.generator, **self._draws)  # type: ignore[call-overload]

    def uniform(self, *shape: int) -> Tensor:
        """Uniform draws on [0, 1) in float64 on the generator's device."""
        return torch.rand(*shape, generator=self.generator, **self._draws)  # type: ignore[call-overload]

    def gamma(self, concentration: float, *shape: int) -> Tensor:
        """Gamma(concentration, rate 1) draws in float64 on the generator's device."""
        alpha = torch.full(shape, float(concentration), **self._draws)  # type: ignore[call-overload]
        return torch._standard_gamma(alpha, generator=self.generator)

    def poisson(self, rate: Tensor) -> Tensor:
        """Poisson draws, one for each entry of ``rate``."""
        return torch.poisson(rate.to(**self._draws), generator=self.generator)  # type: ignore[call-overload]

    def parameter(self, value: Tensor) -> Tensor:
        """A kernel parameter, detached, in float64 on the generator's device."""
        return value.detach().to(**self._draws)  # type: ignore[call-overload]


Builder = Callable[..., FeatureMap]
_B = TypeVar("_B", bound=Builder)


@dataclass(frozen=True)
class _Rule:
    """How a type of kernel gets features; see ``register_features``."""

    builder: Builder
    parts: Callable[[Kernel], Sequence[Kernel]] | None
    reads: Collection[str] | None


_RULES: dict[type[Kernel], _Rule] = {}


def register_features(
    kernel_type: type[Kernel],
    *,
    parts: Callable[[Kernel], Sequence[Kernel]] | None = None,
    reads: Collection[str] | None = None,
) -> Callable[[_B], _B]:
    """Decorator that makes a function the builder of features of a kernel type.

    The builder is called as ``builder(kernel, request)`` with a
    :class:`FeatureRequest` and returns a :class:`FeatureMap` on inputs of
    ``request.dim`` columns. ``active_dims`` of the kernel are already applied.
    It has to read parameters detached (``request.parameter``) and draw all
    randomness from ``request.generator``.

    Args:
        kernel_type: The kernel class. Subclasses that override nothing of it
            but their constructor are covered as well, all others are not.
        parts: For a kernel made of kernels: returns those, so that
            :func:`has_features` can ask them.
        reads: Attributes of the class that must be its own for the builder to be
            right; subclasses may override all others. Default: every attribute.

    Raises:
        TypeError: If ``kernel_type`` is not a GPyTorch kernel class.
    """
    check_kernel_class(kernel_type)

    def register(builder: _B) -> _B:
        _RULES[kernel_type] = _Rule(builder, parts, reads)
        return builder

    return register


def check_kernel_class(kernel_type: object) -> None:
    """Raise TypeError for what is not a class of GPyTorch kernels."""
    if not (isinstance(kernel_type, type) and issubclass(kernel_type, Kernel)):
        raise TypeError(f"kernel_type must be a Kernel class, found {kernel_type!r}")


def _rule_of(kernel: Kernel) -> _Rule | None:
    """The rule that is right for ``kernel``, or None.

    A subclass inherits the builder only if no class between the two redefines
    an attribute of the registered one: a subclass with another ``forward`` is
    another kernel.
    """
    for cls in type(kernel).__mro__:
        if cls in _RULES:
            return None if _overrides(type(kernel), cls) else _RULES[cls]
    return None


def _overrides(cls: type, base: type[Kernel]) -> bool:
    between = cls.__mro__[: cls.__mro__.index(base)]
    redefined = {name for other in between for name in vars(other)}
    reads = _RULES[base].reads
    if reads is not None:
        return any(name in redefined for name in (*reads, "__call__"))
    return any(
        hasattr(base, name)
        for name in redefined
        if name == "__call__" or not (name.startswith("__") or name.startswith("_abc_"))
    )


def has_features(kernel: Kernel) -> bool:
    """Whether :func:`random_features` knows the kernel and all of its parts.

    A map of a known kernel can still turn out too large (a polynomial in many
    dimensions); then :func:`random_features` raises :class:`NoRandomFeatures`.
    """
    return part_without_features(kernel) is None


def part_without_features(kernel: Kernel) -> Kernel | None:
    """The first part of ``kernel`` (or itself) that has no builder, or None."""
    rule = _rule_of(kernel)
    if rule is None:
        return kernel
    parts = () if rule.parts is None else rule.parts(kernel)
    missing = (part_without_features(part) for part in parts)
    return next((part for part in missing if part is not None), None)


def random_features(
    kernel: Kernel,
    *,
    dim: int,
    num_features: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> FeatureMap:
    """Draw a feature map phi with E[phi(x)^T phi(x')] = k(x, x').

    Fourier features come in sine and cosine pairs, so phi(x)^T phi(x) = k(x, x)
    without error, and an odd ``num_features`` is rounded up. Every random part
    of a sum gets all ``num_features`` (the map of a sum of k parts has k times
    as many); a product of stationary parts has ``num_features``, a product with
    an exact finite map that many times its own number of features. Exact maps
    (``exact`` is True) ignore ``num_features``.

    Args:
        kernel: A GPyTorch kernel without batch shape. Parameters are read
            detached, once: later changes do not reach the map.
        dim: Number of columns of the inputs.
        num_features: Number of random features of each random part.
        generator: Source of all randomness. The same seed gives the same map,
            in float32 up to rounding.
        dtype: Data type of the map. Default: float32.
        device: Device of the map. Default: the CPU.

    Raises:
        NoRandomFeatures: If the kernel, or a part of it, has no features.
        ValueError: If ``dim`` or ``num_features`` is not positive or does not fit
            the kernel, the kernel has a batch shape, or a parameter is not finite.
    """
    check_count("dim", dim, 1)
    check_count("num_features", num_features, 1)
    check_parameters(kernel)
    request = FeatureRequest(dim, num_features, generator, dtype, torch.device(device))
    return features_of(kernel, request)


def exact_features(kernel: Kernel, x: Float[Tensor, "n d"]) -> FeatureMap | None:
    """The exact features of a kernel, in the dtype of x; None if it has none.

    Raises:
        ValueError: The kernel's features do not have that dtype, or do not fit x.
    """
    if x.shape[1] == 0 or not has_features(kernel):
        return None
    try:
        found = random_features(
            kernel,
            dim=x.shape[1],
            num_features=1,
            generator=torch.Generator(),
            dtype=x.dtype,
            device=x.device,
        )
    except NoRandomFeatures:
        return None
    return found if found.exact else None


def check_parameters(kernel: Kernel) -> None:
    """Raise ValueError for a batch of kernels or parameters that are not finite."""
    if len(kernel.batch_shape):
        raise ValueError(
            f"{type(kernel).__name__} has batch shape {tuple(kernel.batch_shape)}; "
            "expected one kernel (an empty batch shape)"
        )
    check_finite_parameters(type(kernel).__name__, kernel)


def features_of(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Features of ``kernel`` as it is called, its ``active_dims`` included."""
    dims = kernel.active_dims
    if dims is None:
        return forward_features_of(kernel, request)
    # GPyTorch selects columns with index_select, which has no negative indices.
    if dims.numel() and not 0 <= int(dims.min()) <= int(dims.max()) < request.dim:
        raise ValueError(
            f"active_dims {dims.tolist()} of {type(kernel).__name__} do not fit "
            f"inputs with {request.dim} columns"
        )
    inner = replace(request, dim=dims.numel())
    return forward_features_of(kernel, inner).restricted(dims.to(request.device))


def forward_features_of(kernel: Kernel, request: FeatureRequest) -> FeatureMap:
    """Features of ``kernel.forward``: its ``active_dims`` are not applied."""
    rule = _rule_of(kernel)
    if rule is None:
        raise NoRandomFeatures(kernel)
    ard = kernel.ard_num_dims
    if ard is not None and ard != request.dim:
        raise ValueError(
            f"{type(kernel).__name__} has ard_num_dims={ard} but sees "
            f"{request.dim} input columns"
        )
    made = rule.builder(kernel, request)
    if not isinstance(made, FeatureMap):
        raise TypeError(
            f"the feature builder of {type(kernel).__name__} must return a "
            f"FeatureMap, found {type(made).__name__}"
        )
    return made
