"""The functions that are maximised, over the unit cube."""

from __future__ import annotations

from collections.abc import Callable

import torch
from botorch.test_functions import Ackley, Hartmann, Levy
from botorch.test_functions.base import BaseTestProblem
from botorch.utils.transforms import unnormalize
from torch import Tensor

PROBLEMS: dict[str, Callable[..., BaseTestProblem]] = {
    "hartmann6": Hartmann,
    "ackley6": Ackley,
    "levy6": Levy,
}
"""BoTorch's test functions with its own bounds, in six dimensions, negated."""

DIM = 6


class Objective:
    """A test function over the unit cube; the larger the better.

    Attributes:
        optimum: The largest value there is.
    """

    def __init__(self, name: str) -> None:
        """The function of that name.

        Raises:
            ValueError: There is none.
        """
        if name not in PROBLEMS:
            raise ValueError(
                f"functions: found {name!r}, expected some of {', '.join(PROBLEMS)}"
            )
        self._function = PROBLEMS[name](dim=DIM, negate=True).double()
        self._bounds = torch.as_tensor(self._function.bounds)
        self.optimum = float(torch.as_tensor(self._function.optimal_value))

    def __call__(self, x: Tensor) -> Tensor:
        """Values (n, 1) at x (n, 6) in the unit cube."""
        return self._function(unnormalize(x, self._bounds)).unsqueeze(-1)
