"""Features that BoTorch's prior paths get for kernels that BoTorch refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from botorch.models import SingleTaskGP
from botorch.sampling.pathwise import draw_kernel_feature_paths
from botorch.sampling.pathwise.features import KernelFeatureMap, gen_kernel_features
from gpytorch.kernels import (
    ConstantKernel,
    CosineKernel,
    IndexKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch.quasirandom import SobolEngine

from sgdgp.botorch.kernel_features import KernelFeatures, kernel_element
from sgdgp.features import NoRandomFeatures

FEATURES = 4096

KERNELS = {
    "rational quadratic": lambda: RQKernel(ard_num_dims=4),
    "periodic of two columns": lambda: PeriodicKernel(active_dims=[1, 3]),
    "linear": LinearKernel,
    "polynomial": lambda: PolynomialKernel(power=2),
    "sum": lambda: MaternKernel(nu=2.5) + LinearKernel(),
    "product": lambda: RBFKernel(active_dims=[0, 2]) * RQKernel(active_dims=[1]),
    "scaled rational quadratic": lambda: ScaleKernel(RQKernel(active_dims=[1, 2])),
    "scaled sum": lambda: ScaleKernel(
        MaternKernel(nu=1.5, active_dims=[3]) + ScaleKernel(LinearKernel())
    ),
    "sum of scaled": lambda: (
        ScaleKernel(RQKernel(active_dims=[0])) + ScaleKernel(RBFKernel())
    ),
    "shifted": lambda: RBFKernel() + ConstantKernel(),
    "tasks": lambda: (
        MaternKernel(active_dims=[0, 1, 2])
        * IndexKernel(num_tasks=3, rank=2, active_dims=[3])
    ),
}


def changed(kernel: Kernel) -> Kernel:
    """The kernel with other hyperparameters than everybody has to begin with."""
    torch.manual_seed(1)
    for parameter in kernel.parameters():
        parameter.data += 0.5 * torch.randn_like(parameter)
    return kernel.double()


def points(n: int = 7) -> torch.Tensor:
    """Points in three dimensions, and a task."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, 3, generator=generator, dtype=torch.float64)
    return torch.cat([x, torch.arange(n).remainder(3).unsqueeze(1)], dim=1)


def features_of(kernel: Kernel, count: int = FEATURES, seed: int = 0):
    torch.manual_seed(seed)
    return gen_kernel_features(kernel, num_inputs=4, num_outputs=count)


@pytest.mark.parametrize("name", KERNELS)
def test_inner_products_of_features_are_the_kernel(name):
    kernel, x = changed(KERNELS[name]()), points()
    made = features_of(kernel)
    with torch.no_grad():
        phi, truth = made(x), kernel(x).to_dense()
    assert phi.shape == (7, made.num_outputs)
    # Each entry is a mean over 2,048 frequencies: five standard errors.
    error = 5 * truth.diagonal().max() / FEATURES**0.5
    assert float((phi @ phi.mT - truth).abs().max()) < error


def test_features_of_a_batch_of_kernels_are_those_of_its_elements():
    kernel = ScaleKernel(
        RQKernel(ard_num_dims=2, active_dims=[0, 2], batch_shape=torch.Size([2]))
        + LinearKernel(batch_shape=torch.Size([2])),
        batch_shape=torch.Size([2]),
    )
    kernel, x = changed(kernel), points()
    made = features_of(kernel)
    with torch.no_grad():
        phi, truth = made(x), kernel(x).to_dense()
        moved = made(x.expand(3, 1, 7, 4))
    assert phi.shape == (2, 7, made.num_outputs)
    assert moved.shape == (3, 2, 7, made.num_outputs)
    torch.testing.assert_close(moved[1], phi)
    for product, own in zip(phi @ phi.mT, truth, strict=True):
        assert float((product - own).abs().max()) < 5 * own.max() / FEATURES**0.5
    assert float((truth[0] - truth[1]).abs().max()) > 0.1


def test_one_kernel_of_a_batch_is_what_the_batch_evaluates():
    three = torch.Size([3])
    kernel = ScaleKernel(
        ScaleKernel(RQKernel(active_dims=[0, 2], batch_shape=three), batch_shape=three)
        + RBFKernel(),
        batch_shape=three,
    )
    kernel, x = changed(kernel), points()
    before = copy.deepcopy(kernel.state_dict())
    truth = kernel(x).to_dense()
    for index in range(3):
        one = kernel_element(kernel, (5, index))
        assert not one.batch_shape
        assert one(x).shape == (7, 7)
        torch.testing.assert_close(one(x).to_dense(), truth[index])
    for name, value in kernel.state_dict().items():
        torch.testing.assert_close(value, before[name])


def test_a_kernel_without_a_batch_is_its_own_element():
    kernel = RQKernel()
    assert kernel_element(kernel, (1, 2)) is kernel


@pytest.mark.parametrize("kernel", [RBFKernel(), ScaleKernel(MaternKernel(nu=1.5))])
def test_botorchs_own_kernels_keep_its_own_features(kernel):
    assert type(features_of(kernel)) is KernelFeatureMap


def test_the_global_seed_decides_and_parameters_need_no_gradient():
    x, kernel = points(), changed(RQKernel())
    first, again, other = (features_of(kernel, 16, seed)(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
    assert not first.requires_grad


def test_features_can_be_differentiated_in_the_inputs():
    made = features_of(changed(KERNELS["scaled sum"]()), 8)
    x = points(3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: made(x).sum(-1), x)


def test_maps_stay_below_the_width_of_sobol_weights():
    kernel = RQKernel() + RQKernel() + LinearKernel()
    made = features_of(kernel, 15_000)
    assert isinstance(made, KernelFeatures)
    assert 0.99 * SobolEngine.MAXDIM < made.num_outputs <= SobolEngine.MAXDIM


def test_prior_functions_have_the_prior_variance():
    x = points(5)[:, :3]
    kernel = ScaleKernel(RQKernel(ard_num_dims=3) + LinearKernel()).double()
    model = SingleTaskGP(x, x.sum(1, keepdim=True), covar_module=kernel).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        paths = draw_kernel_feature_paths(model, sample_shape=torch.Size([4096]))
        values = paths(x)
        truth = model.covar_module(x).to_dense()
    scale = model.outcome_transform.stdvs.square().squeeze()
    assert values.shape == (4096, 5)
    error = 5 * (2 / 4096) ** 0.5 + 5 / 1024**0.5
    assert float((values.mT.cov() / scale - truth).abs().max()) < error * truth.max()


def test_a_kernel_that_nobody_knows_is_refused_by_name():
    with pytest.raises(NoRandomFeatures, match="CosineKernel"):
        features_of(ScaleKernel(CosineKernel()))
    with pytest.raises(NotImplementedError):  # BoTorch's own way to say so
        features_of(RBFKernel() + CosineKernel())
