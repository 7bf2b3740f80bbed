"""KeOps: the same matrix from one formula that holds every leaf."""

from __future__ import annotations

import sys

import pytest
import torch
from gpytorch.kernels import (
    ConstantKernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

from sgdgp.operators import KeopsOperator, keops
from tests.operators.kernel_cases import L1Kernel


def every_leaf():
    # One formula, so one compilation: each leaf has a scale of its own.
    smooth = (
        ScaleKernel(MaternKernel(0.5, active_dims=(0, 3)))
        + ScaleKernel(MaternKernel(1.5, ard_num_dims=4))
        + ScaleKernel(MaternKernel(2.5))
        + ScaleKernel(RQKernel())
    )
    other = ScaleKernel(RBFKernel(active_dims=(1,))) * LinearKernel()
    rest = PeriodicKernel() + PolynomialKernel(2) + ConstantKernel()
    kernel = ScaleKernel(smooth + other + rest).double()
    with torch.no_grad():
        for i, parameter in enumerate(kernel.parameters()):
            parameter.add_(0.1 * i)
    return kernel


@pytest.mark.keops
def test_keops_agrees_with_gpytorch_for_every_leaf_at_once(generator, capfd):
    kernel = every_leaf()
    x, x_new = (
        torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (40, 7)
    )
    v = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    operator = KeopsOperator(kernel, x)
    truth = kernel(x).to_dense().detach()
    index = torch.randint(0, 40, (11,), generator=generator)
    torch.testing.assert_close(operator @ v, truth @ v)
    torch.testing.assert_close(operator.rows(index) @ v, truth[index] @ v)
    torch.testing.assert_close(operator.rows(slice(3, 9)) @ v, truth[3:9] @ v)
    torch.testing.assert_close(operator.diagonal(), truth.diagonal())
    torch.testing.assert_close(operator.block(index, index), truth[index][:, index])
    torch.testing.assert_close(
        operator.cross(x_new) @ v, kernel(x_new, x).to_dense().detach() @ v
    )
    assert capfd.readouterr().out == ""


def test_a_kernel_without_a_formula_is_refused_by_name():
    with pytest.raises(ValueError, match="L1Kernel has no tile form"):
        KeopsOperator(L1Kernel(), torch.zeros(3, 1))


def test_without_pykeops_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pykeops", None)
    with pytest.raises(ImportError, match="pip install pykeops"):
        KeopsOperator(RBFKernel(), torch.zeros(3, 1))


def test_keops_is_tried_in_another_process_before_it_is_used_on_a_gpu(monkeypatch):
    keops._survives_on_a_gpu.cache_clear()
    monkeypatch.setattr(keops, "import_keops", lambda: None)
    monkeypatch.setattr(keops.sys, "executable", "false")
    gpu = torch.device("cuda")
    assert not keops.keops_is_available(gpu)
    with pytest.raises(ImportError, match="ends its process on this GPU"):
        keops._need_keops(gpu)
    keops._survives_on_a_gpu.cache_clear()
    monkeypatch.setattr(keops.sys, "executable", "true")
    assert keops.keops_is_available(gpu)
    keops._survives_on_a_gpu.cache_clear()


def test_a_product_without_a_compiler_says_what_is_missing(monkeypatch):
    class Formula:
        def __mul__(self, other):
            raise ModuleNotFoundError("No module named 'pykeops_cpp_8db'")

    class Module:
        Vj = staticmethod(lambda v: v)

    with pytest.raises(ImportError, match=r"needs a C\+\+ compiler"):
        keops._reduced(Formula(), Module, torch.ones(2, 1))
