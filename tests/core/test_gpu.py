"""What only a GPU can show; skipped without one."""

from __future__ import annotations

import pytest
import torch
from gpytorch.kernels import MaternKernel, PiecewisePolynomialKernel, RBFKernel

import sgdgp
from sgdgp.core.memory import free_memory
from sgdgp.operators import DenseOperator
from sgdgp.operators.keops import keops_is_available
from tests.models import GP

pytestmark = pytest.mark.gpu
FEW = {"num_samples": 4, "num_features": 128}


def data(device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs, targets and test inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(200, 3, generator=generator, dtype=torch.float64)
    at = torch.rand(9, 3, generator=generator, dtype=torch.float64)
    return x.to(device), torch.sin(5 * x).sum(1).to(device), at.to(device)


@pytest.mark.parametrize("kernel", [MaternKernel, PiecewisePolynomialKernel])
@pytest.mark.parametrize(("here", "there"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_functions_are_the_same_on_both_devices_and_files_move(
    kernel, here, there, tmp_path
):
    found = {}
    for device in (here, there):
        x, y, at = data(device)
        model = GP(x, y, kernel=kernel().double()).to(device)
        posterior = sgdgp.condition(model, **FEW)
        posterior.save(tmp_path / device)
        found[device] = posterior.samples(at).cpu()
    torch.testing.assert_close(found[here], found[there], rtol=1e-6, atol=1e-6)
    x, y, at = data(there)
    model = GP(x, y, kernel=kernel().double()).to(there)
    moved = sgdgp.load(tmp_path / here, model)
    torch.testing.assert_close(
        moved.samples(at).cpu(), found[here], rtol=1e-6, atol=1e-6
    )


def test_work_on_the_cpu_ignores_a_gpu_as_default_device(tmp_path):
    x, y, at = data("cpu")
    model = GP(x, y, kernel=MaternKernel().double())
    expected = sgdgp.condition(model, solver="cg", **FEW).samples(at)
    torch.set_default_device("cuda")
    try:
        posterior = sgdgp.condition(model, solver="cg", **FEW)
        posterior.save(tmp_path / "posterior")
        torch.testing.assert_close(posterior.samples(at), expected)
    finally:
        torch.set_default_device(None)


def test_what_torch_keeps_for_later_is_free():
    torch.cuda.empty_cache()
    before = free_memory("cuda")
    held = torch.empty(2**28, device="cuda")
    during = free_memory("cuda")
    del held
    assert during < before - 2**29
    assert free_memory("cuda") > during + 2**29


def test_a_kernel_matrix_that_does_not_fit_says_which_argument_helps():
    x = torch.zeros(1_000_000, 1, device="cuda")  # 4 TB
    with pytest.raises(torch.OutOfMemoryError, match="memory_budget"):
        DenseOperator(RBFKernel().cuda(), x).matmul(x)
    x, y, at = data("cuda")
    model = GP(x, y, kernel=MaternKernel().double()).cuda()
    assert sgdgp.condition(model, **FEW).mean(at).isfinite().all()


def test_a_keops_that_ends_its_process_is_not_chosen():
    # Whatever the answer, this process has to live to hear it.
    assert keops_is_available(torch.device("cuda")) in (True, False)
