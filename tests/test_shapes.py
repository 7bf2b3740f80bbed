"""Wrong shapes, kinds and results are found in whatever part of sgdgp tests call."""

from __future__ import annotations

from dataclasses import dataclass
from typing import no_type_check

import jaxtyping
import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp import metrics
from tests.shapes import jaxtyped


@pytest.fixture(autouse=True)
def _with_the_shape_checker(_errors_as_a_user_sees_them):
    jaxtyping.config.update("jaxtyping_disable", False)


@jaxtyped
@dataclass
class Line:
    slope: Float[Tensor, " d"]

    @jaxtyped
    def at(self, x: Float[Tensor, "n d"], fine: bool = True) -> Float[Tensor, " n"]:
        return x @ self.slope if fine else x

    @property
    @jaxtyped
    def d(self) -> int:
        return "two" if len(self.slope) == 2 else len(self.slope)


X, SLOPE = torch.ones(4, 3), torch.ones(3)


def test_right_shapes_pass():
    line = Line(SLOPE)
    assert line.at(X).tolist() == [3.0] * 4
    assert line.d == 3
    # The names of one call are not those of the next.
    assert line.at(X[:2]).tolist() == [3.0] * 2


@pytest.mark.parametrize(
    "call",
    [
        lambda: Line(X),
        lambda: Line(SLOPE.int()),
        lambda: Line(SLOPE).at(X[0]),
        lambda: Line(SLOPE).at(X, fine=None),
        lambda: Line(SLOPE).at(X, fine=False),
        lambda: Line(SLOPE[:2]).d,
        lambda: metrics.rmse(SLOPE, SLOPE[:2]),
    ],
)
def test_wrong_ones_are_found(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_function_may_be_exempt():
    @no_type_check
    @jaxtyped
    def doubled(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        return 2 * x

    assert doubled(3) == 6
