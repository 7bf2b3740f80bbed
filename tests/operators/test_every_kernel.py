"""Rows, blocks, diagonals and products agree with to_dense() for every kernel."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from sgdgp.features import has_features, random_features
from sgdgp.features.dispatch import exact_features
from sgdgp.operators import (
    DenseOperator,
    FeatureOperator,
    KernelOperator,
    RowBlocksOperator,
    TiledOperator,
    choose_operator,
    tile_kernel,
)
from tests.operators.kernel_cases import CASES, TILED, Case, tolerance
from tests.operators.matrix_truth import is_the_cross_matrix, is_the_matrix
from tests.stored import stored

OPERATORS: dict[type[KernelOperator], Callable[[Case], bool]] = {
    DenseOperator: lambda case: True,
    TiledOperator: lambda case: case.tiled,
    RowBlocksOperator: lambda case: not case.tiled,  # it would only be slower
    FeatureOperator: lambda case: exact_features(case.kernel(), case.x(1)) is not None,
}
"""Every operator, and which kernels it is tested with (KeOps: see test_keops)."""

DTYPES = {"float64": torch.float64, "float32": torch.float32}


def agree(found: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == truth.shape
    assert not found.requires_grad
    torch.testing.assert_close(
        found.double(), truth, rtol=0, atol=tolerance(truth, dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("name", CASES)
@hypothesis.given(
    n=st.integers(1, 23),
    m=st.integers(1, 9),
    k=st.integers(1, 4),
    seed=st.integers(0, 1000),
    rows=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    columns=st.lists(st.integers(0, 10**6), min_size=1, max_size=12),
    cuts=st.tuples(st.integers(0, 30), st.integers(0, 30)),
    budget=st.sampled_from([2**10, 2**14, 2**30]),
)
@hypothesis.settings(max_examples=5, phases=[hypothesis.Phase.generate])
def test_the_operator_is_the_kernel_matrix(
    name, dtype, n, m, k, seed, rows, columns, cuts, budget
):
    case = CASES[name]
    kernel = case.kernel(seed).to(dtype)
    x, x_new = case.x(n, seed).to(dtype), case.x(m, seed + 1).to(dtype)
    operators = [
        operator(kernel, x, memory_budget=budget)
        for operator, takes in OPERATORS.items()
        if takes(case)
    ]
    chosen = choose_operator(kernel, x, memory_budget=2**30)
    assert isinstance(chosen, DenseOperator)
    exact = deepcopy(kernel).double()
    if name == "grid_interpolation":  # which of all grids is up to the operator
        exact = deepcopy(operators[0].kernel).double()
    truth = exact(x.double()).to_dense().detach()

    def within_rounding(found, truth):
        agree(found, truth, dtype)

    for operator in operators:
        is_the_matrix(operator, truth, k, rows, columns, cuts, within_rounding)

    crosses = [operator.cross(x_new) for operator in operators]
    if name == "grid_interpolation":
        exact = deepcopy(crosses[0].kernel).double()
    cross_truth = exact(x_new.double(), x.double()).to_dense().detach()
    for cross in crosses:
        is_the_cross_matrix(cross, cross_truth, k, columns, within_rounding)


@pytest.mark.parametrize("name", CASES)
def test_tile_forms_exist_for_exactly_the_kernels_that_are_known(name):
    assert (tile_kernel(CASES[name].kernel()) is not None) == CASES[name].tiled


@pytest.mark.parametrize("name", CASES)
def test_products_are_linear_and_the_matrix_is_symmetric(name):
    case = CASES[name]
    operator = choose_operator(case.kernel(3), case.x(17, 3), memory_budget=2**12)
    size = operator.shape[0]
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, size, 2, generator=generator, dtype=torch.float64)
    combined = operator @ (2 * a - 3 * b)
    torch.testing.assert_close(combined, 2 * (operator @ a) - 3 * (operator @ b))
    torch.testing.assert_close((operator @ a).T @ b, a.T @ (operator @ b))


@pytest.mark.parametrize("name", CASES)
def test_a_permuted_operator_is_the_operator_of_the_permuted_points(name):
    case = CASES[name]
    kernel, x = case.kernel(5), case.x(9, 5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    operator = choose_operator(kernel, x, memory_budget=2**30)
    permuted = operator.permuted(order)
    everything = slice(0, operator.shape[0])
    if name == "grid_interpolation":
        kernel = permuted.source.kernel
    torch.testing.assert_close(
        permuted.block(everything, everything), kernel(x[order]).to_dense().detach()
    )


class Formula:
    """What a lazy tensor of KeOps is to a formula, evaluated at once (a, b, p)."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def sqdist(self, other: Formula) -> Formula:
        difference = self.values - other.values
        return Formula(difference.square().sum(-1, keepdim=True))

    def sum(self, axis: int) -> Formula:
        return Formula(self.values.sum(axis, keepdim=True))

    def __neg__(self) -> Formula:
        return Formula(-self.values)

    def __getattr__(self, name: str):  # exp, sqrt, log, relu
        return lambda: Formula(getattr(self.values, name)())


def _of_values(name: str):
    def operation(self: Formula, other: Formula | float) -> Formula:
        other = other.values if isinstance(other, Formula) else other
        return Formula(getattr(self.values, name)(other))

    return operation


for _name in [
    "add",
    "radd",
    "sub",
    "rsub",
    "mul",
    "rmul",
    "truediv",
    "rtruediv",
    "pow",
]:
    setattr(Formula, f"__{_name}__", _of_values(f"__{_name}__"))


@pytest.mark.parametrize("name", TILED)
def test_formulas_for_keops_are_the_kernel(name):
    case = CASES[name]
    kernel, x, x_new = case.kernel(2), case.x(11, 2), case.x(7, 3)
    tile, origin = tile_kernel(kernel), x.mean(0)
    assert tile.has_keops
    rows, columns = (tile.keops_inputs(points, origin) for points in (x_new, x))
    assert len(rows) == len(columns) == tile.num_keops_inputs
    found = tile.keops_formula(
        tuple(Formula(form.unsqueeze(1)) for form in rows),
        tuple(Formula(form.unsqueeze(0)) for form in columns),
    )
    truth = kernel(x_new, x).to_dense().detach()
    torch.testing.assert_close(tile.factor * found.values.squeeze(-1), truth)


@pytest.mark.parametrize(
    "name", [name for name in CASES if has_features(CASES[name].kernel())]
)
def test_features_have_the_kernel_as_their_mean_and_are_stored(name):
    case = CASES[name]
    kernel, x, count = case.kernel(2), case.x(8, 2), 16
    products = []
    for seed in range(count):
        found = random_features(
            kernel,
            dim=x.shape[1],
            num_features=1000,
            generator=torch.Generator().manual_seed(seed),
            dtype=x.dtype,
        )
        phi = found.features(x)
        products.append(phi @ phi.T)
    deviation, mean = torch.std_mean(torch.stack(products), 0)
    # An exact map and a diagonal deviate by rounding, which is no random error.
    error = (mean - kernel(x).to_dense().detach()).abs() - 1e-10 * mean.abs().max()
    assert (error < 6 * deviation / count**0.5).all()
    assert found.exact == bool((deviation < 1e-10).all())
    assert torch.equal(stored(found).features(x), phi)
