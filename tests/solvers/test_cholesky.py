"""The direct solver against dense algebra."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import Kernel
from torch.utils._python_dispatch import TorchDispatchMode

from sgdgp.operators import DenseOperator
from sgdgp.solvers import Cholesky
from sgdgp.solvers.cholesky import (
    backward_substitute,
    factorise,
    factorise_,
    forward_substitute,
    solve_factored,
)
from sgdgp.solvers.system import as_system
from tests.solvers.problems import KERNELS, OPERATORS, problem, rbf, relative_error


class Indefinite(Kernel):
    """Squared distances: symmetric, and no kernel."""

    def forward(self, x1, x2, diag=False, **params):
        if diag:
            return torch.zeros(x1.shape[:-1], dtype=x1.dtype)
        return torch.cdist(x1, x2) ** 2


class LargeStorages(TorchDispatchMode):
    """Notes every new storage of at least so many bytes."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes = nbytes
        self.found: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage.nbytes() >= self.nbytes:
                    # Held, so that no address is used twice.
                    self.found[storage.data_ptr()] = storage
        return out


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_agrees_with_the_dense_solution(kernel, operator):
    p = problem(kernel, 300, noise=0.05, operator=operator)
    found = p.solve(Cholesky())
    assert found.reason == "converged"
    assert relative_error(found.weights, p.answer) < 1e-10
    assert float(p.residuals(found.weights).max()) < 1e-10


@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 24, 61])
@pytest.mark.parametrize("block", [1, 8, 64])
def test_the_blocked_factor_is_the_cholesky_factor(n, block):
    matrix = problem("matern12", n).matrix
    factor = matrix.clone()
    address = factor.data_ptr()
    assert factorise_(factor, block)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(matrix))
    assert factor.data_ptr() == address


@pytest.mark.parametrize("block", [1, 8, 64])
def test_blocked_substitution_reads_only_the_lower_triangle(block):
    p = problem("matern12", 29, k=3)
    lower = torch.linalg.cholesky(p.matrix)
    factor = torch.where(torch.ones_like(lower).tril().bool(), lower, torch.nan)
    kept = p.rhs.clone()
    forward = forward_substitute(factor, p.rhs, block)
    backward = backward_substitute(factor, p.rhs, block)
    torch.testing.assert_close(lower @ forward, p.rhs)
    torch.testing.assert_close(lower.mT @ backward, p.rhs)
    torch.testing.assert_close(solve_factored(factor, p.rhs, block), p.answer)
    assert torch.equal(p.rhs, kept)


def test_a_matrix_larger_than_a_block_is_factorised():
    n = 1100
    p = problem("matern32", n, noise=0.1)
    system = as_system(p.operator, p.noise, p.rhs)
    factor, jitter, passes = factorise(system)
    torch.testing.assert_close(factor.tril(), torch.linalg.cholesky(p.matrix))
    assert (jitter, passes) == (0.0, 1.0)


def test_noise_per_row_is_the_diagonal_of_sigma():
    noise = torch.logspace(-4, 1, 80).double()
    p = problem("rbf", 80, noise=noise)
    assert relative_error(p.solve(Cholesky()).weights, p.answer) < 1e-8


@pytest.mark.parametrize("kernel", ["rbf", "scale", "polynomial"])
def test_float32_data_are_solved_to_what_float32_can_hold(kernel):
    p = problem(kernel, 300, noise=0.05, dtype=torch.float32)
    found = p.solve(Cholesky())
    true = p.residuals(found.weights, p.exact_matrix)
    assert found.weights.dtype == torch.float32
    assert found.reason == "converged"
    torch.testing.assert_close(found.residuals.double(), true, rtol=0.1, atol=1e-6)
    answer = torch.linalg.solve(p.exact_matrix, p.rhs.double())
    assert relative_error(found.weights, answer) < 1e-6


def test_a_singular_matrix_gets_a_jitter_and_says_so():
    x = torch.zeros(60, 2, dtype=torch.float64)
    operator = DenseOperator(rbf().double(), x)
    rhs = torch.ones(60, 1, dtype=torch.float64)
    found = Cholesky().solve(operator, 1e-19, rhs)
    assert found.settings["jitter"] > 0
    assert "jitter" in found.warnings[0]
    # K is all ones: only the sum of the weights is determined.
    assert abs(float(found.weights.sum()) - 1.0) < 1e-8
    assert found.reason == "converged"


def test_what_is_not_positive_definite_is_refused():
    x = torch.randn(30, 2, generator=torch.Generator().manual_seed(0)).double()
    operator = DenseOperator(Indefinite(), x)
    rhs = torch.ones(30, 1, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="not positive definite"):
        Cholesky().solve(operator, 1e-3, rhs)
    assert not factorise_(operator.block(slice(0, 30), slice(0, 30)).clone(), 8)


def _large_storages(operator: str) -> int:
    n = 2100
    p = problem("matern12", n, k=1, noise=0.1, operator=operator)
    with LargeStorages(8 * n * n) as storages:
        found = p.solve(Cholesky())
    assert found.reason == "converged"
    return len(storages.found)


def test_only_one_matrix_is_held_beside_a_streaming_operator():
    assert _large_storages("tiled") == 1


def test_only_one_matrix_is_held_beside_an_operator_in_memory():
    assert _large_storages("dense") == 1


def test_an_answer_that_float32_cannot_hold_is_not_called_converged():
    p = problem("rbf", 200, noise=1e-6, dtype=torch.float32)
    found = p.solve(Cholesky())
    assert found.reason == "stagnated"
    assert torch.isfinite(found.weights).all()
    assert float(found.residuals.max()) > 1e-3
    assert "float32" in found.warnings[-1]


def test_the_result_is_never_worse_than_zero():
    p = problem("polynomial", 200, noise=1e-6, dtype=torch.float32)
    found = p.solve(Cholesky())
    assert float(p.residuals(found.weights, p.exact_matrix).max()) <= 1.0


@pytest.mark.parametrize("bad", [-1.0, 0.0, float("nan")])
def test_a_tolerance_that_is_not_positive_is_refused(bad):
    with pytest.raises(ValueError, match="tolerance"):
        Cholesky(tolerance=bad)


def test_the_callback_can_stop_it_and_weights_stay_honest():
    p = problem("rbf", 300, noise=1e-4)
    found = p.solve(Cholesky(tolerance=1e-30), callback=lambda progress: True)
    assert found.reason == "interrupted"
    torch.testing.assert_close(
        found.residuals, p.residuals(found.weights), rtol=0.5, atol=1e-13
    )


MIXED = Cholesky(factor_dtype=torch.float32)


@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_factor_in_float32_gives_the_answer_of_float64(kernel, operator):
    p = problem(kernel, 200, noise=0.01, operator=operator)
    found = p.solve(MIXED)
    assert found.reason == "converged"
    assert found.weights.dtype == torch.float64
    assert found.settings["factor_dtype"] == "torch.float32"
    assert float(p.residuals(found.weights).max()) <= 1.01e-8
    assert relative_error(found.weights, p.answer) < 1e-6
    # Measured: at most 7 (polynomial).
    assert 1 <= found.settings["refinements"] <= 12


@pytest.mark.parametrize("noise", [1e-4, 1e-6])
def test_low_noise_needs_a_jitter_and_more_steps_and_is_solved(noise):
    p = problem("rbf", 400, noise=noise)
    found = p.solve(MIXED)
    assert found.reason == "converged"
    assert float(p.residuals(found.weights).max()) <= 1.01e-8
    if noise == 1e-6:
        # Plain refinement contracts by jitter / (noise + jitter) = 0.91 at best.
        assert found.settings["jitter"] >= 9e-7
        assert 5 < found.settings["refinements"] < 80
    assert found.warnings == ()


@pytest.mark.parametrize("kernel", ["rbf", "linear", "polynomial", "constant"])
def test_where_a_float32_factor_fails_it_says_so(kernel):
    p = problem(kernel, 200, noise=1e-9)
    found = p.solve(MIXED)
    true, slack = p.residuals(found.weights), p.rounding(found.weights)
    assert bool(((true - found.residuals).abs() <= slack + 1e-6 * true).all())
    assert bool((true <= 1.0 + slack).all())
    assert (found.reason == "converged") == (float(found.residuals.max()) <= 1e-8)
    if found.reason == "stagnated":
        assert "factor_dtype=torch.float64" in found.warnings[-1]


def test_the_jitter_in_float32_is_the_smallest_that_will_do():
    for noise, expected in ((0.1, 0.0), (1e-6, 1e-5)):
        p = problem("rbf", 500, noise=noise, dtype=torch.float32)
        system = as_system(p.operator, p.noise, p.rhs)
        factor, jitter, passes = factorise(system)
        assert factor.dtype == torch.float32
        assert jitter == pytest.approx(expected)
        assert passes == (1.0 if expected == 0.0 else 4.0)
        assert torch.isfinite(factor.tril()).all()


@pytest.mark.parametrize("kernel", ["rbf", "scale"])
def test_float32_data_with_a_float32_factor_are_solved_as_well(kernel):
    p = problem(kernel, 300, noise=0.05, dtype=torch.float32)
    found, reference = p.solve(MIXED), p.solve(Cholesky())
    assert found.reason == "converged"
    true = p.residuals(found.weights, p.exact_matrix)
    torch.testing.assert_close(found.residuals.double(), true, rtol=0.1, atol=1e-6)
    assert float(true.max()) <= 1e-3
    assert relative_error(found.weights, reference.weights.double()) < 1e-3


def test_noise_per_row_and_zero_columns_and_any_scale():
    noise = torch.logspace(-4, 1, 80).double()
    p = problem("rbf", 80, k=4, noise=noise)
    p.rhs[:, 1] = 0.0
    p.rhs[:, 2] *= 1e-80
    p.rhs[:, 3] *= 1e80
    found = p.solve(MIXED)
    assert found.reason == "converged"
    assert not found.weights[:, 1].any()
    kept = torch.tensor([0, 2, 3])
    assert relative_error(found.weights[:, kept], p.answer[:, kept]) < 1e-5


def test_passes_and_history_of_a_float32_factor_are_counted():
    p = problem("matern32", 200, noise=1e-3)
    found = p.solve(MIXED)
    # The fill, the steps, the last of which checks the recurrence, and the weights.
    assert found.passes == 1.0 + found.settings["refinements"] + 1.0
    assert found.history[-1].exact
    assert found.history[-1].residuals == pytest.approx(tuple(found.residuals.tolist()))
    passes = [entry.passes for entry in found.history]
    assert passes == sorted(passes)


@pytest.mark.parametrize("stop_after", [1, 2])
def test_the_callback_can_stop_the_steps_with_a_float32_factor(stop_after):
    p = problem("rbf", 300, noise=1e-6)
    seen = []

    def callback(progress):
        seen.append(progress)
        return len(seen) >= stop_after

    found = p.solve(MIXED, callback=callback)
    assert found.reason == "interrupted"
    assert len(seen) <= stop_after + 2
    torch.testing.assert_close(found.residuals, p.residuals(found.weights))


def test_a_limit_on_steps_holds_for_a_float32_factor():
    p = problem("rbf", 300, noise=1e-6)
    found = p.solve(Cholesky(factor_dtype=torch.float32, max_refinements=2))
    assert found.reason == "stagnated"
    assert found.settings["refinements"] <= 2
    assert float(p.residuals(found.weights).max()) <= 1.0


def test_a_float32_factor_takes_half_the_memory():
    n = 1500
    p = problem("matern12", n, k=1, noise=0.1, operator="tiled")
    with LargeStorages(4 * n * n) as storages:
        found = p.solve(MIXED)
    assert found.reason == "converged"
    assert [s.nbytes() for s in storages.found.values()] == [4 * n * n]


@pytest.mark.parametrize("n", [1, 2, 9])
def test_tiny_systems_have_a_float32_factor_too(n):
    p = problem("matern12", n)
    assert relative_error(p.solve(MIXED).weights, p.answer) < 1e-7


def test_a_factor_of_another_dtype_is_refused():
    with pytest.raises(ValueError, match=r"factor_dtype.*float16"):
        Cholesky(factor_dtype=torch.float16)
