"""Columns of an operator times a matrix: the numbers of the dense kernel matrix."""

from __future__ import annotations

import pytest
import torch

from sgdgp.operators import DenseOperator, RowBlocksOperator, TiledOperator
from sgdgp.operators import base as operators_base
from tests.operators.kernel_cases import CASES, tolerance

NAMES = [name for name in CASES if name != "grid_interpolation"]
KINDS = {"dense": DenseOperator, "row_blocks": RowBlocksOperator}


def _indices(size: int) -> list[torch.Tensor | slice]:
    return [
        slice(2, 7),
        slice(0, size),
        slice(3, 3),
        torch.tensor([size - 1, 0, 4, 4]),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("square", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_columns_are_those_of_the_kernel_matrix(name, square, dtype):
    case = CASES[name]
    kernel, x = case.kernel().to(dtype), case.x(23).to(dtype)
    x_rows = None if square else case.x(11, 1).to(dtype)
    kinds = dict(KINDS, tiled=TiledOperator) if case.tiled else KINDS
    for kind in kinds.values():
        operator = kind(kernel, x, x_rows)
        rows, size = operator.shape
        truth = operator.block(slice(0, rows), slice(0, size)).double()
        for index in _indices(size):
            chosen = truth[:, index]
            generator = torch.Generator().manual_seed(0)
            v = torch.randn(chosen.shape[1], 3, generator=generator).to(dtype)
            found = operator.columns(index) @ v
            assert found.dtype == dtype
            expected = chosen @ v.double()
            torch.testing.assert_close(
                found.double(), expected, rtol=0, atol=10 * tolerance(truth, dtype)
            )
            torch.testing.assert_close(
                operator.columns(index).to_dense().double(),
                chosen,
                rtol=0,
                atol=10 * tolerance(truth, dtype),
            )


@pytest.mark.parametrize("limit", [1, 4, 100])
def test_a_block_of_columns_is_streamed_in_few_rows_at_a_time(monkeypatch, limit):
    case = CASES["nested_active_dims"]
    operator = TiledOperator(case.kernel(), case.x(40))
    seen = []
    block = operator.block
    monkeypatch.setattr(operators_base, "_BLOCK_ROWS", limit)
    monkeypatch.setattr(
        operator, "block", lambda i, j: seen.append(i.stop - i.start) or block(i, j)
    )
    v = torch.ones(5, 2, dtype=torch.float64)
    found = operator.columns(slice(10, 15)).matmul(v)
    torch.testing.assert_close(found, block(slice(0, 40), slice(10, 15)) @ v)
    assert max(seen) == min(limit, 40)
    assert sum(seen) == 40


@pytest.mark.parametrize("kind", [DenseOperator, TiledOperator])
def test_a_factor_of_the_wrong_shape_or_dtype_is_refused(kind):
    case = CASES["nested_active_dims"]
    operator = kind(case.kernel(), case.x(12))
    columns = operator.columns(slice(0, 5))
    with pytest.raises(ValueError, match=r"shape \(5, k\)"):
        columns.matmul(torch.ones(6, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        columns.matmul(torch.ones(5, 1, dtype=torch.float32))
