"""Many small blocks at once: the same entries as one at a time."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import Kernel, MaternKernel

from sgdgp.operators import DenseOperator, KeopsOperator, TiledOperator
from sgdgp.operators.dense import streaming_operator
from tests.operators.kernel_cases import CASES, tolerance


class NoBatches(Kernel):
    """A user's kernel that knows two dimensions only."""

    def forward(self, x1, x2, diag=False, **params):
        if x1.ndim != 2:
            raise RuntimeError("two dimensions expected")
        difference = x1[:, None] - x2[None]
        if diag:
            return torch.ones(len(x1), dtype=x1.dtype)
        return torch.exp(-difference.square().sum(-1))


def indices(n: int) -> torch.Tensor:
    index = torch.randint(0, n, (5, 4), generator=torch.Generator().manual_seed(1))
    index[1, 1] = index[1, 0]
    return index


def one_by_one(operator, index: torch.Tensor) -> torch.Tensor:
    n = operator.shape[0]
    wide = operator.to(torch.float64).block(slice(0, n), slice(0, n))
    return torch.stack([wide[rows][:, rows] for rows in index])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_every_kernel_has_small_blocks(name, dtype):
    case = CASES[name]
    operator = streaming_operator(case.kernel().to(dtype), case.x(12).to(dtype))
    index = indices(operator.shape[0])
    found, truth = operator.small_blocks(index), one_by_one(operator, index)
    assert found.dtype == dtype
    assert float((found.double() - truth).abs().max()) < tolerance(truth, dtype)
    # The caller may add to them: no entry is an alias of another, or of K.
    found += torch.arange(found.numel()).reshape(found.shape)
    again = operator.small_blocks(index).double()
    assert float((again - truth).abs().max()) < tolerance(truth, dtype)


@pytest.mark.parametrize("operator", [DenseOperator, TiledOperator, KeopsOperator])
def test_every_operator_has_small_blocks(operator):
    case = CASES["matern32_ard"]
    built = operator(case.kernel(), case.x(30))
    index = indices(30)
    torch.testing.assert_close(built.small_blocks(index), one_by_one(built, index))


def test_entries_in_memory_are_not_overwritten():
    operator = DenseOperator(CASES["rbf"].kernel(), CASES["rbf"].x(20))
    kept = operator.entries.clone()
    operator.small_blocks(indices(20)).zero_()
    assert torch.equal(operator.entries, kept)


def test_a_kernel_that_knows_no_batches_is_evaluated_block_by_block():
    operator = streaming_operator(NoBatches(), CASES["rbf"].x(20))
    index = indices(20)
    torch.testing.assert_close(
        operator.small_blocks(index), one_by_one(operator, index)
    )


def test_blocks_need_not_be_all_of_the_rows_and_may_be_of_one():
    operator = streaming_operator(CASES["rbf"].kernel(), CASES["rbf"].x(20))
    torch.testing.assert_close(
        operator.small_blocks(torch.tensor([[3], [7]])),
        torch.ones(2, 1, 1).double(),
    )


def test_near_neighbours_far_from_the_origin_are_not_rounded_away():
    # Distances by |x|^2 + |y|^2 - 2 x.y in float32 put these correlations off by 1e-2.
    generator = torch.Generator().manual_seed(0)
    kernel = MaternKernel(0.5)
    kernel.lengthscale = 0.05
    base = torch.randn(50, 3, generator=generator)
    near = base + 5e-6 * torch.randn(50, 3, generator=generator)
    operator = streaming_operator(kernel, torch.cat([base, near]))
    rows = torch.arange(50)
    index = torch.stack([rows, rows + 50, rows.roll(1)], dim=1)
    truth = one_by_one(operator, index)
    error = (operator.small_blocks(index).double() - truth).abs().max()
    assert float(error) < 1e-6


def test_the_callers_kernel_keeps_its_dtype():
    kernel = CASES["rbf_ard"].kernel().float()
    operator = streaming_operator(kernel, CASES["rbf_ard"].x(20).float())
    operator.small_blocks(indices(20))
    assert kernel.lengthscale.dtype == torch.float32
