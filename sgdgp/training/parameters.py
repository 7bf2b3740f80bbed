"""The parameters of a model: read, averaged and scattered through their constraints."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import gpytorch
import torch
from gpytorch.constraints import GreaterThan, Interval, LessThan, Positive
from gpytorch.utils.transforms import inv_softplus
from torch import Tensor
from torch.nn.functional import softplus

Constraint: TypeAlias = gpytorch.constraints.Interval | None

_LARGEST = 64
"""Numbers of one parameter that are told, at most: lengthscales, but no tables."""

_BESIDE = 1e-6
"""How far from a bound the image of a value on it is: a bound itself has none."""

_EDGE = 0.05
"""Share of an interval at each end that scattered parameters keep out of: on a bound
itself the gradient is zero."""


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters and buffers by name."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def put_state(model: torch.nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load parameters and buffers, and touch nothing else.

    BoTorch's own method also transforms the training data anew, which rounds them.
    """
    torch.nn.Module.load_state_dict(model, state)


def learned_parameters(
    model: torch.nn.Module,
) -> Iterator[tuple[str, torch.nn.Parameter, Constraint]]:
    """Names, parameters and constraints of what GPyTorch modules learn.

    Networks in front of a kernel are none, so their weights are left out.
    """
    for path, module in model.named_modules():
        if isinstance(module, gpytorch.Module):
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    constraint = getattr(module, f"{name}_constraint", None)
                    yield ".".join(filter(None, (path, name))), parameter, constraint


@dataclass(frozen=True)
class Image:
    """What an optimiser that knows no bounds moves in place of a bounded value.

    A constraint without a transform, as BoTorch has for its own optimiser, makes the
    value itself the parameter: a step of 0.1 is far for a noise of 0.01, and leads out
    of bounds. The value is a softplus or sigmoid of its image instead, as in GPyTorch.

    Attributes:
        parameter: The value.
        leaf: Its image, of the same shape.
        constraint: Its bounds.
    """

    parameter: torch.nn.Parameter
    leaf: torch.nn.Parameter
    constraint: gpytorch.constraints.Interval

    @classmethod
    def of(cls, parameter: torch.nn.Parameter, constraint: Interval) -> Image:
        """The image of where the value is; on a bound, of a place beside it."""
        value = parameter.detach()
        lower, upper = (bound.to(value) for bound in constraint)
        tiny = torch.finfo(value.dtype).eps
        if type(constraint) is Interval:
            leaf = ((value - lower) / (upper - lower)).clamp(tiny, 1 - tiny).logit()
        else:
            away = upper - value if type(constraint) is LessThan else value - lower
            leaf = inv_softplus(away.where(away > 0, away.new_tensor(_BESIDE)))
        return cls(parameter, torch.nn.Parameter(leaf), constraint)

    def value(self) -> Tensor:
        """The value of the image, with a graph."""
        lower, upper = (bound.to(self.leaf) for bound in self.constraint)
        if type(self.constraint) is Interval:
            return lower + (upper - lower) * self.leaf.sigmoid()
        away = softplus(self.leaf)
        return upper - away if type(self.constraint) is LessThan else lower + away

    def take_gradient(self) -> None:
        """Give the image the gradient that the value has."""
        gradient = self.parameter.grad
        if gradient is not None:
            (self.leaf.grad,) = torch.autograd.grad(self.value(), self.leaf, gradient)
            self.parameter.grad = None

    @torch.no_grad()
    def put_value(self) -> None:
        """Move the value to where its image is."""
        self.parameter.copy_(self.value())


def images_of(model: torch.nn.Module) -> list[Image]:
    """Images of the learned values that are bounded and not transformed."""
    found: dict[int, Image] = {}
    for _, parameter, constraint in learned_parameters(model):
        # Of other classes, those without a transform mean to have none.
        if type(constraint) in (Interval, GreaterThan, Positive, LessThan):
            assert constraint is not None
            if not constraint.enforced and id(parameter) not in found:
                found[id(parameter)] = Image.of(parameter, constraint)
    return list(found.values())


def moved_by_optimiser(
    parameters: Iterable[torch.nn.Parameter], images: Iterable[Image]
) -> list[torch.nn.Parameter]:
    """Parameters, with the leaf of its image in place of each that has one."""
    leaves = {id(image.parameter): image.leaf for image in images}
    return [leaves.get(id(p), p) for p in parameters]


def parameter_values(model: torch.nn.Module) -> dict[str, tuple[float, ...]]:
    """Learned parameters through their constraints, by names without "raw_"."""
    values: dict[str, tuple[float, ...]] = {}
    for name, parameter, constraint in learned_parameters(model):
        if 0 < parameter.numel() <= _LARGEST:
            value = parameter.detach()
            if constraint is not None:
                value = constraint.transform(value)
            path, dot, last = name.rpartition(".")
            shown = f"{path}{dot}{last.removeprefix('raw_')}"
            values[shown] = tuple(value.flatten().tolist())
    return values


def to_average(parameter: Tensor, constraint: Constraint) -> Tensor:
    """What is averaged of a parameter: of positive ones their logarithm."""
    value = parameter.detach()
    if constraint is None:
        return value
    value = constraint.transform(value)
    return value.log() if _is_positive(constraint) else value


def from_average(average: Tensor, constraint: Constraint) -> Tensor:
    """The parameter of an average; the inverse of ``to_average``."""
    if constraint is None:
        return average
    return constraint.inverse_transform(
        average.exp() if _is_positive(constraint) else average
    )


@torch.no_grad()
def scatter(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Move a model's constrained parameters to a random place, in place.

    Positive parameters are multiplied by exp(N(0, 1)), those in an interval drawn
    uniformly from it. Parameters without a constraint (means, networks) stay.
    """
    for _, parameter, constraint in learned_parameters(model):
        if constraint is not None:
            value = _scattered(constraint.transform(parameter), constraint, generator)
            parameter.copy_(constraint.inverse_transform(value))


def _scattered(
    value: Tensor,
    constraint: gpytorch.constraints.Interval,
    generator: torch.Generator,
) -> Tensor:
    lower = constraint.lower_bound.to(value)
    upper = constraint.upper_bound.to(value)
    if bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        share = torch.rand(
            value.shape,
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        share = _EDGE + (1 - 2 * _EDGE) * share.to(value)
        return lower + (upper - lower) * share
    if bool((lower >= 0).all()):
        factor = torch.randn(
            value.shape,
            generator=generator,
            device=generator.device,
            dtype=torch.float64,
        )
        return lower + (value - lower) * factor.exp().to(value)
    return value


def _is_positive(constraint: gpytorch.constraints.Interval) -> bool:
    return bool((constraint.lower_bound >= 0).all())


def like_all(values: Sequence[Tensor], parameters: Sequence[Tensor]) -> list[Tensor]:
    """Values of parameters, on their devices.

    Raises:
        ValueError: There are more or fewer, or one has another shape.
    """
    pairs = list(zip(values, parameters, strict=True))
    if any(value.shape != parameter.shape for value, parameter in pairs):
        raise ValueError("values of parameters have other shapes")
    return [value.to(parameter) for value, parameter in pairs]
