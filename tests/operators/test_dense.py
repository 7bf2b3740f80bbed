"""The operator in memory: lazy, without copies, the same numbers."""

from __future__ import annotations

import torch
from gpytorch.kernels import RBFKernel

from sgdgp.operators import DenseOperator, RowBlocksOperator, TiledOperator
from tests.operators.kernel_cases import CASES


def test_nothing_is_computed_before_the_first_product(generator):
    operator = DenseOperator(RBFKernel(), torch.randn(20, 3, generator=generator))
    permuted = operator.permuted(torch.arange(19, -1, -1))
    permuted.diagonal()
    assert operator._entries is None
    assert permuted._entries is None
    permuted @ torch.ones(20, 1)
    assert permuted._entries is not None
    assert operator._entries is None


def test_blocks_of_slices_are_views_of_the_entries(generator):
    operator = DenseOperator(RBFKernel(), torch.randn(20, 3, generator=generator))
    block = operator.block(slice(2, 9), slice(5, 8))
    assert block.data_ptr() == operator.entries[2:9, 5:8].data_ptr()


def test_dense_tiled_and_row_blocks_are_the_same_matrix(generator):
    case = CASES["nested_active_dims"]
    kernel, x = case.kernel(), case.x(40)
    v = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    index = torch.randint(0, 40, (11,), generator=generator)
    dense, tiled, blocks = (
        kind(kernel, x) for kind in (DenseOperator, TiledOperator, RowBlocksOperator)
    )
    for other in (tiled, blocks):
        torch.testing.assert_close(dense @ v, other @ v)
        torch.testing.assert_close(dense.rows(index) @ v, other.rows(index) @ v)
        torch.testing.assert_close(dense.diagonal(), other.diagonal())


def test_cross_operators_stream(generator):
    x = torch.randn(20, 3, generator=generator)
    cross = DenseOperator(RBFKernel(), x).cross(torch.randn(7, 3, generator=generator))
    assert cross.shape == (7, 20)
    assert cross.name == "tiled"
    assert DenseOperator(RBFKernel(), x).to(torch.float64).name == "dense"


def test_the_chosen_matrix_is_filled_by_the_operator_that_was_asked_for_its_size():
    kernel, x = CASES["rbf"].kernel(), CASES["rbf"].x(9)
    source = TiledOperator(kernel, x)
    operator = DenseOperator.filled_by(source)
    assert operator.source is source
    assert operator.is_square
    torch.testing.assert_close(operator.entries, kernel(x).to_dense().detach())


def test_an_operator_in_the_dtype_it_has_is_itself_else_a_copy():
    kernel, x = CASES["rbf"].kernel(), CASES["rbf"].x(9)
    operator = TiledOperator(kernel, x)
    assert operator.to(torch.float64) is operator
    single = operator.to(torch.float32)
    assert single.dtype == torch.float32
    assert kernel.raw_lengthscale.dtype == torch.float64
    mixed = TiledOperator(single.kernel, x)
    assert mixed.to(torch.float64).kernel.raw_lengthscale.dtype == torch.float64
