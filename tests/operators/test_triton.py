"""The Triton operator against float64, its kernel run by Triton's interpreter.

Errors are relative to the norm of the product. On a machine with CUDA the same tests
run there.
"""

from __future__ import annotations

import sys
from copy import deepcopy
from functools import partial

import pytest
import torch
from gpytorch.kernels import (
    Kernel,
    MaternKernel,
    PeriodicKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import Tensor

from sgdgp.core.processes import Processes
from sgdgp.kernels.registry import register_tile_kernel
from sgdgp.kernels.stationary import RBFTile
from sgdgp.operators import choose, choose_operator, operator_by_name, tiled, triton
from sgdgp.operators.triton import MediumTritonOperator, TritonOperator
from sgdgp.solvers.iterates import BlockIterate
from sgdgp.solvers.system import as_system
from tests.operators.quadratic_truth import agree, by_autograd, by_operator

pytest.importorskip("triton", reason="needs triton, which is made for Linux")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FAMILIES = {
    "rbf": RBFKernel,
    "rq": RQKernel,
    **{f"matern{nu}": partial(MaternKernel, nu) for nu in (0.5, 1.5, 2.5)},
}


def with_duplicates(n: int, d: int, generator: torch.Generator) -> Tensor:
    """Normal points (n, d) far from zero, some of them twice and some almost."""
    x = torch.randn(n, d, generator=generator)
    x[5:10] = x[:5]
    x[10:15] = x[:5] + 1e-3 * torch.randn(5, d, generator=generator)
    return (x + 1.0).to(DEVICE)


def normal(n: int, k: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, k, generator=generator).to(DEVICE)


def truth(kernel: Kernel, x: Tensor, x_new: Tensor | None = None) -> Tensor:
    """K(x_new, x) in float64."""
    new = x if x_new is None else x_new
    with torch.no_grad():
        return deepcopy(kernel).double()(new.double(), x.double()).to_dense()


def error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_products_of_a_family_agree_with_float64(family, d, generator):
    kernel = ScaleKernel(FAMILIES[family](ard_num_dims=d, active_dims=range(1, d + 1)))
    kernel.base_kernel.lengthscale = torch.linspace(0.7, 2.0, d)
    kernel = kernel.to(DEVICE)
    # Three tiles: with duplicates, by products alone, and with the diagonal.
    x, v = with_duplicates(130, d + 1, generator), normal(130, 3, generator)
    rows = torch.tensor([0, 5, 10, 128, 129], device=DEVICE)
    operator = TritonOperator(kernel, x)
    assert operator.is_fused
    v[:, 1] *= 1e-12  # columns are scaled one by one
    found, expected = operator.rows(rows) @ v, truth(kernel, x)[rows] @ v.double()
    assert max(error(found[:, k], expected[:, k]) for k in range(3)) < 3e-6


def test_rows_columns_and_other_points(generator):
    kernel = MaternKernel(0.5).to(DEVICE)
    x, new = (with_duplicates(n, 5, generator) for n in (70, 20))
    v = normal(70, 2, generator).mT.contiguous().mT
    operator, entries = TritonOperator(kernel, x), truth(kernel, x)
    index = torch.randperm(70, generator=generator).to(DEVICE)[::8]  # not contiguous
    assert error(operator.rows(index) @ v, entries[index] @ v.double()) < 1e-6
    assert error(operator @ v, entries @ v.double()) < 1e-6
    rows = slice(60, 67)
    assert error(operator.rows(rows) @ v, entries[rows] @ v.double()) < 1e-6
    product = operator.columns(index) @ v[:9]
    assert error(product, entries[:, index] @ v[:9].double()) < 1e-6
    product = operator.cross(new) @ v
    assert error(product, truth(kernel, x, new) @ v.double()) < 2e-6
    torch.testing.assert_close(operator.diagonal(), torch.ones(70, device=DEVICE))
    assert operator.rows(slice(3, 3)).matmul(v).shape == (0, 2)


@pytest.mark.skipif(DEVICE == "cuda", reason="an index error there ends the process")
@pytest.mark.parametrize("outside", [-1, 70])
def test_a_row_that_is_not_there_is_refused(outside, generator):
    operator = TritonOperator(RBFKernel(), with_duplicates(70, 5, generator))
    with pytest.raises((IndexError, RuntimeError)):
        operator.rows(torch.tensor([3, outside])).matmul(normal(70, 2, generator))


@pytest.mark.parametrize("columns", [1, 17, 70, 81])
def test_any_number_of_columns(columns, generator):
    x, v = with_duplicates(40, 4, generator), normal(40, columns, generator)
    kernel = MaternKernel(1.5).to(DEVICE)
    assert error(TritonOperator(kernel, x) @ v, truth(kernel, x) @ v.double()) < 1e-6


several_parts = pytest.mark.parametrize(
    "kernel",
    [
        ScaleKernel(RBFKernel(active_dims=(0, 1))) * RBFKernel(active_dims=(2, 4)),
        ScaleKernel(ScaleKernel(RBFKernel()) * MaternKernel(2.5)) + RQKernel(),
        (ScaleKernel(RBFKernel()) + ScaleKernel(MaternKernel(1.5, active_dims=(1,))))
        * ScaleKernel(MaternKernel(0.5)),
    ],
    ids=["one exponential", "a b + c", "(a + b) c"],
)


@several_parts
def test_sums_and_products_of_up_to_three(kernel, generator):
    x, v = with_duplicates(60, 5, generator), normal(60, 2, generator)
    kernel = deepcopy(kernel).to(DEVICE)
    with torch.no_grad():
        for i, parameter in enumerate(kernel.parameters()):
            parameter.add_(0.2 * i)
    operator = TritonOperator(kernel, x)
    assert operator.is_fused
    assert error(operator @ v, truth(kernel, x) @ v.double()) < 1e-6


@pytest.fixture
def no_tiles(monkeypatch):
    def refuse(*args):
        raise AssertionError("the form came from tiles")

    monkeypatch.setattr(tiled, "form_by_tiles", refuse)


def check_form(operator: TritonOperator, generator: torch.Generator) -> None:
    """The form, and its gradients by all parameters and inputs, are autograd's."""
    a, b = (normal(len(operator.x), 2, generator) for _ in range(2))
    a[:, 1] *= 1e-3
    found = by_operator(operator, operator.kernel, a, b)
    value, gradients = by_autograd(operator.kernel, operator.x, a, b)
    # The direction of a pair that is almost one point has lost digits in float32.
    agree(found, (value, {"x": gradients.pop("x")}), 3e-4)
    agree(found, (value, gradients), 1e-5)


@pytest.mark.parametrize("d", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_a_family_agree_with_float64(family, d, no_tiles, generator):
    kernel = ScaleKernel(FAMILIES[family](ard_num_dims=d, active_dims=range(1, d + 1)))
    operator = TritonOperator(kernel.to(DEVICE), with_duplicates(66, d + 1, generator))
    # Those of the parameters as they are.
    kernel.base_kernel.lengthscale = torch.linspace(0.7, 2.0, d, device=DEVICE)
    check_form(operator, generator)


@several_parts
def test_gradients_of_sums_and_products(kernel, no_tiles, generator):
    kernel = deepcopy(kernel).to(DEVICE)
    check_form(TritonOperator(kernel, with_duplicates(40, 5, generator)), generator)


def test_forms_of_many_columns_in_parts_and_of_tiles_without_near_pairs(
    no_tiles, generator
):
    kernel = MaternKernel(0.5, ard_num_dims=20).to(DEVICE)
    kernel.lengthscale = 5.0
    x, (a, b) = normal(66, 20, generator), normal(132, 25, generator).split(66)
    truth, operator = by_autograd(kernel, x, a, b), TritonOperator(kernel, x)
    agree(by_operator(operator, kernel, a, b), truth, 1e-5)
    found = []
    for rank in range(2):
        operator.part = Processes(rank, 2)
        found.append(by_operator(operator, kernel, a, b))
    value = sum(value for value, _ in found)
    names = found[0][1]
    agree((value, {k: found[0][1][k] + found[1][1][k] for k in names}), truth, 1e-5)


def test_medium_precision_is_that_of_float16(generator):
    kernel = MaternKernel(1.5).to(DEVICE)
    kernel.lengthscale = 2.0
    x, v = with_duplicates(66, 5, generator), normal(66, 2, generator)
    operator = MediumTritonOperator(kernel, x)
    assert operator.is_fused
    assert 1e-5 < error(operator @ v, truth(kernel, x) @ v.double()) < 1e-3


class _Squared(RBFTile):
    def profile(self, d2, scratch):
        super().profile(d2, scratch)
        d2.square_()


class _SquaredKernel(RBFKernel):
    def forward(self, x1, x2, **params):
        return super().forward(x1, x2, **params) ** 2


@register_tile_kernel(_SquaredKernel)
def _squared(kernel, dims):
    return _Squared(1.0, dims, kernel.lengthscale[0].reciprocal())


@pytest.mark.parametrize(
    ("kernel", "dtype", "spread"),
    [
        (RBFKernel(), torch.float64, 1.0),
        (RBFKernel(), torch.float32, 100.0),
        (RQKernel() + PeriodicKernel(), torch.float32, 1.0),
        (_SquaredKernel(), torch.float32, 1.0),
    ],
    ids=["float64", "far inputs", "another family", "another profile"],
)
def test_what_the_kernel_has_no_form_for_is_left_to_tiles(
    kernel, dtype, spread, generator
):
    x, v = with_duplicates(20, 5, generator) * spread, normal(20, 2, generator)
    kernel, x, v = (t.to(device=DEVICE, dtype=dtype) for t in (kernel, x, v))
    operator = TritonOperator(kernel, x)
    assert not operator.is_fused
    tiles = operator_by_name("tiled", kernel, x)
    assert torch.equal(operator @ v, tiles @ v)
    assert torch.equal(operator.quadratic_form(v, v), tiles.quadratic_form(v, v))


def test_rows_are_taken_in_strips_where_there_are_many(monkeypatch, generator):
    kernel = RBFKernel().to(DEVICE)
    x, v = with_duplicates(140, 2, generator), normal(140, 1, generator)
    monkeypatch.setattr(triton, "_MOST_TILES", 3)
    assert error(TritonOperator(kernel, x) @ v, truth(kernel, x) @ v.double()) < 1e-6


def test_it_is_chosen_where_it_works(monkeypatch, generator):
    x = with_duplicates(70, 5, generator)
    monkeypatch.setattr(choose, "TRITON_FROM", 70)
    monkeypatch.setattr(choose, "_triton_works", lambda device: True)
    assert choose_operator(RBFKernel().to(DEVICE), x).name == "triton"
    assert choose_operator(PeriodicKernel().to(DEVICE), x).name == "dense"
    assert choose_operator(RBFKernel().to(DEVICE), x[:69]).name == "dense"
    for name in ("triton", "triton_medium"):
        assert operator_by_name(name, RBFKernel().to(DEVICE), x).name == name


def test_without_triton_the_error_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "sgdgp.operators.triton_kernel", None)
    assert not choose._agrees(torch.device("cpu"))
    with pytest.raises(ImportError, match="comes with PyTorch for CUDA"):
        operator_by_name("triton", RBFKernel(), torch.zeros(3, 1))


def test_the_first_product_is_held_against_tiles():
    assert choose._agrees(torch.device(DEVICE))
    assert not choose._triton_works(torch.device("cpu"))


def test_the_gradient_of_a_block_stays_true_when_its_launches_are_replayed(generator):
    """Of a GPU: they are recorded after some steps, and anew when columns leave."""
    kernel, x = MaternKernel(1.5).to(DEVICE), with_duplicates(70, 2, generator)
    operator, noise = TritonOperator(kernel, x), 0.1
    system = as_system(operator, noise, normal(70, 3, generator))
    iterate = BlockIterate(system, torch.zeros_like(system.rhs))
    matrix, rhs = truth(kernel, x), system.rhs.double()
    matrix.diagonal().add_(noise)
    for step in range(90):
        if step == 60:
            rest = torch.tensor([True, False, True], device=DEVICE)
            iterate.keep(rest)
            rhs = rhs[:, rest]
        block = slice(20, 60) if step % 2 else slice(30, 70)
        found = iterate.gradient(block)
        expected = matrix[block] @ iterate.point.values.double() - rhs[block]
        assert error(found, expected) < 1e-5
        iterate.step(block, found, z_step=0.02, u_step=0.01, momentum=0.5, lag=0.5)
