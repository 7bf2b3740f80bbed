"""The value of a function whose gradient is all one has, along a path.

The log determinant of a large matrix is dear, its gradient is not. Along the steps
of an optimiser

    L(t + 1) - L(t) ~ (g_t + g_{t+1})^T (p_{t+1} - p_t) / 2,

the trapezoid rule, which is exact for quadratics and of third order in the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class PathIntegral:
    """Adds up what a function gains from one point to the next.

    Attributes:
        value: At the last point; counted from its first value.
    """

    value: float = 0.0
    _point: list[Tensor] = field(default_factory=list, repr=False)
    _gradient: list[Tensor] = field(default_factory=list, repr=False)

    def move(self, point: Sequence[Tensor], gradient: Sequence[Tensor]) -> float:
        """Go on to a point with the gradient there; the value at it.

        Where the gradient is not finite there is no value (NaN), and the path does
        not lead there.

        Args:
            point: Parameters, in the same order every time.
            gradient: Gradients of the function with respect to them.
        """
        here = [p.detach().clone() for p in point]
        slope = [g.detach().clone() for g in gradient]
        if not all(bool(torch.isfinite(g).all()) for g in slope):
            return math.nan
        if self._point:
            self.value += 0.5 * sum(
                float(((before + now) * _moved(p, q)).double().sum())
                for before, now, p, q in zip(
                    self._gradient, slope, here, self._point, strict=True
                )
            )
        self._point, self._gradient = here, slope
        return self.value

    def state(self) -> dict[str, Tensor]:
        """Everything, as tensors by name."""
        return {
            "value": torch.tensor(self.value, dtype=torch.float64),
            **{f"point.{i}": p for i, p in enumerate(self._point)},
            **{f"gradient.{i}": g for i, g in enumerate(self._gradient)},
        }

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> PathIntegral:
        """The inverse of ``state``."""
        count = sum(name.startswith("point.") for name in state)
        return cls(
            float(state["value"]),
            [state[f"point.{i}"] for i in range(count)],
            [state[f"gradient.{i}"] for i in range(count)],
        )


def _moved(p: Tensor, q: Tensor) -> Tensor:
    """The way from q to p; zero also where both are infinite, as on a bound."""
    return torch.where(p == q, torch.zeros_like(p), p - q)
