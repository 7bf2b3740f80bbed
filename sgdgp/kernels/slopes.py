"""Profiles with derivatives: tile values and d(value)/d(argument) in one go.

The argument is what ``stationary`` and ``dot_product`` have before their
profile: a squared distance d2 of inputs scaled for exponentials to the base 2
(u = sqrt(d2)), or an inner product. Constants are peeled off the derivative.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

_LOG_2 = math.log(2.0)
_TINY = 1e-30


class Slope(ABC):
    """Values and derivatives of a function, tile by tile.

    A slope may be a function of one hyperparameter as well; it then serves one form
    only, and adds up the gradient of that.
    """

    constant: float = 1.0
    """What the derivatives are to be multiplied by."""

    wants_gradient: bool = False
    """Whether the function has a hyperparameter of its own with a graph."""

    @abstractmethod
    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        """Replace arguments by values and write derivatives over ``constant``.

        Args:
            value: Arguments (a, b), overwritten with values.
            derivative: Buffer (a, b).
            scratch: Buffer (a, b); kept until ``pull``.
            floor: (a, 1): squared distances up to it are rounding errors.
        """

    def pull(self, weight: Tensor, scratch: Tensor) -> None:  # noqa: B027
        """Add what dS/dvalue = ``weight`` means for the hyperparameter, if any."""

    def gradients(self, outer: float) -> Iterator[tuple[Tensor, Tensor]]:
        """``outer`` times the gradient of the hyperparameter, if there is one."""
        return iter(())


class Identity(Slope):
    """The inner product itself."""

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        derivative.fill_(1)


class RBFSlope(Slope):
    """2^-d2."""

    constant = -_LOG_2

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        derivative.copy_(value.clamp_min_(0).neg_().exp2_())


class Matern12Slope(Slope):
    """2^-u; its derivative -ln 2 / 2 * 2^-u / u is taken as zero at distance zero.

    It has a kink there: any direction is as good as its opposite, and rounding
    errors divided by rounding errors are worse than nothing.
    """

    constant = -0.5 * _LOG_2

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        same = value <= floor
        value.masked_fill_(same, 0)
        torch.rsqrt(value.clamp_min_(_TINY), out=derivative)
        value.mul_(derivative).neg_().exp2_()
        derivative.mul_(value).masked_fill_(same, 0)


class Matern32Slope(Slope):
    """(1 + u ln 2) 2^-u, with derivative -ln(2)^2 / 2 * 2^-u."""

    constant = -0.5 * _LOG_2**2

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        torch.rsqrt(value.clamp_min_(_TINY), out=scratch)
        value.mul_(scratch)
        torch.neg(value, out=derivative).exp2_()
        torch.addcmul(derivative, derivative, value, value=_LOG_2, out=value)


class Matern52Slope(Slope):
    """(d2 + 3 u / ln 2 + 3 / ln(2)^2) / 2^u, its derivative -(1 + u ln 2) / 2 / 2^u."""

    constant = -0.5

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        torch.rsqrt(value.clamp_min_(_TINY), out=scratch).mul_(value)
        torch.neg(scratch, out=derivative).exp2_()
        value.add_(scratch, alpha=3.0 / _LOG_2).add_(3.0 / _LOG_2**2).mul_(derivative)
        torch.addcmul(derivative, derivative, scratch, value=_LOG_2, out=derivative)


class RationalQuadraticSlope(Slope):
    """(1 + d2)^-alpha, a function of alpha as well: d/dalpha = -log(1 + d2) value.

    Args:
        alpha: 0-dim, with its graph.
    """

    def __init__(self, alpha: Tensor) -> None:
        self._live = alpha
        self._alpha = alpha.item()
        self.constant = -self._alpha
        self.wants_gradient = alpha.requires_grad
        self._sum = torch.zeros((), dtype=torch.float64, device=alpha.device)

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        torch.log1p(value.clamp_min_(0), out=scratch)
        exponent = -(self._alpha + 1.0) / _LOG_2
        torch.mul(scratch, exponent, out=derivative).exp2_()
        value.add_(1).mul_(derivative)
        scratch.mul_(value)

    def pull(self, weight: Tensor, scratch: Tensor) -> None:
        if self.wants_gradient:
            self._sum -= torch.dot(weight.view(-1), scratch.view(-1))

    def gradients(self, outer: float) -> Iterator[tuple[Tensor, Tensor]]:
        if self.wants_gradient:
            yield self._live, outer * self._sum


class PeriodicSlope(Slope):
    """2^u of an inner product u."""

    constant = _LOG_2

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        derivative.copy_(value.clamp_max_(0).exp2_())


class PowerSlope(Slope):
    """u^p of an inner product u."""

    def __init__(self, power: float) -> None:
        self.constant = self._power = power

    def evaluate(
        self, value: Tensor, derivative: Tensor, scratch: Tensor, floor: Tensor
    ) -> None:
        torch.pow(value, self._power - 1, out=derivative)
        value.mul_(derivative)
