"""The exported LinearOperator is the kernel matrix to linear_operator."""

from __future__ import annotations

import pytest
import torch
from linear_operator.utils import linear_cg

from sgdgp.operators import RowBlocksOperator, TiledOperator
from tests.operators.kernel_cases import CASES


@pytest.fixture(params=["matern32_ard", "user_l1", "multitask"])
def exported(request):
    case = CASES[request.param]
    kernel, x = case.kernel(), case.x(20)
    kind = TiledOperator if case.tiled else RowBlocksOperator
    return kind(kernel, x).to_linear_operator(), kernel(x).to_dense().detach()


def test_products_entries_and_transposes_agree(exported, generator):
    operator, truth = exported
    size = truth.shape[0]
    v = torch.randn(2, size, 3, generator=generator, dtype=torch.float64)
    assert operator.shape == truth.shape
    for found, expected in (
        (operator.to_dense(), truth),
        (operator @ v[0], truth @ v[0]),
        (operator @ v[0, :, 0], truth @ v[0, :, 0]),
        (operator @ v, truth @ v),
        (operator.mT @ v[0], truth @ v[0]),
        (operator.diagonal(), truth.diagonal()),
        (operator[2:7, 4:15].to_dense(), truth[2:7, 4:15]),
        (operator[2:7, 4:15].mT.to_dense(), truth[2:7, 4:15].T),
        (operator[3:9, 3:9].diagonal(), truth[3:9, 3:9].diagonal()),
    ):
        torch.testing.assert_close(found, expected)
    i, j = torch.randint(0, size, (2, 50), generator=generator)
    torch.testing.assert_close(operator[i, j], truth[i, j])


def test_pivoted_cholesky_at_full_rank_reproduces_the_matrix(exported):
    operator, truth = exported
    root = operator.pivoted_cholesky(rank=truth.shape[0], error_tol=1e-12)
    torch.testing.assert_close(root @ root.mT, truth, rtol=0, atol=1e-6)


def test_conjugate_gradients_solve_with_it(exported, generator):
    operator, truth = exported
    size = truth.shape[0]
    b = torch.randn(size, 1, generator=generator, dtype=torch.float64)
    solution = linear_cg(lambda v: operator @ v + v, b, tolerance=1e-8, max_iter=200)
    expected = torch.linalg.solve(truth + torch.eye(size, dtype=torch.float64), b)
    torch.testing.assert_close(solution, expected, rtol=1e-4, atol=1e-5)
