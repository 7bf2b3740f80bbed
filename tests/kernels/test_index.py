"""The index kernel's tiles: what they refuse. Their numbers are those of CASES."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import IndexKernel

from sgdgp.kernels import tile_kernel
from sgdgp.operators import TiledOperator


@pytest.mark.parametrize("task", [-1.0, 3.0])
def test_tasks_that_are_not_in_the_table_are_refused(task):
    x = torch.tensor([[0.0], [task], [2.0]])
    with pytest.raises(ValueError, match="tasks from 0 to 2"):
        TiledOperator(IndexKernel(3), x)


def test_more_than_one_column_of_tasks_is_refused():
    with pytest.raises(ValueError, match="one column of tasks, found 3"):
        TiledOperator(IndexKernel(3), torch.zeros(5, 3))


def test_a_subclass_with_another_forward_has_no_tiles():
    class Other(IndexKernel):
        def forward(self, i1, i2, **params):
            return super().forward(i1, i2, **params).mul(2.0)

    assert tile_kernel(IndexKernel(3)) is not None
    assert tile_kernel(Other(3)) is None
