"""Row blocks: several outputs per point, and memory that follows the budget."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import SpectralMixtureKernel

from sgdgp.operators import RowBlocksOperator
from tests.operators.kernel_cases import CASES


@pytest.mark.parametrize(
    ("name", "outputs"), [("multitask", 2), ("lcm", 2), ("rbf_grad", 4)]
)
def test_rows_of_several_outputs_belong_to_consecutive_points(name, outputs):
    case = CASES[name]
    kernel, x = case.kernel(), case.x(6)
    operator = RowBlocksOperator(kernel, x)
    assert operator.outputs_per_input == outputs
    assert operator.shape == (6 * outputs, 6 * outputs)
    truth = kernel(x).to_dense().detach()
    for start in range(6 * outputs):
        rows = slice(start, 6 * outputs)
        torch.testing.assert_close(operator.block(rows, rows), truth[rows, rows])


def test_a_smaller_budget_means_fewer_rows_at_a_time():
    x = torch.zeros(1000, 2)
    kernel = CASES["user_l1"].kernel()
    small = RowBlocksOperator(kernel, x, memory_budget=10**5)
    large = RowBlocksOperator(kernel, x, memory_budget=10**7)
    assert 1 <= small.rows_per_step < large.rows_per_step
    # A mixture makes temporaries for each of its components.
    mixture = SpectralMixtureKernel(10, ard_num_dims=2)
    wide = RowBlocksOperator(mixture, x, memory_budget=10**7)
    assert wide.rows_per_step < large.rows_per_step


def test_an_interpolation_grid_does_not_depend_on_the_block(generator):
    case = CASES["grid_interpolation"]
    x = case.x(30)
    kernel = case.kernel()
    operator = RowBlocksOperator(kernel, x)
    first = operator.block(slice(0, 3), slice(0, 30))
    everything = operator.block(slice(0, 30), slice(0, 30))
    torch.testing.assert_close(first, everything[:3])
    truth = operator.kernel(x).to_dense().detach()
    torch.testing.assert_close(everything, truth)
    assert not kernel.has_initialized_grid
