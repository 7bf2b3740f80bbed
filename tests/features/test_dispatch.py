"""Which kernels have features, and how users add their own."""

from __future__ import annotations

import gpytorch
import pytest
import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    PiecewisePolynomialKernel,
    RBFKernel,
    ScaleKernel,
)

from sgdgp.features import (
    FourierFeatures,
    NoRandomFeatures,
    has_features,
    random_features,
    register_features,
)
from tests.features.kernels import dense, points


class Laplace(gpytorch.kernels.Kernel):
    """exp(-sum |x - x'|): a product over dimensions, unknown to the package."""

    def forward(self, x1, x2, diag=False, **params):
        distance = (x1.unsqueeze(-2) - x2.unsqueeze(-3)).abs().sum(-1)
        return torch.exp(-distance.diagonal(dim1=-1, dim2=-2) if diag else -distance)


def another(base):
    """A new class with the values of ``base``: registering it leaves no trace."""
    return type(base.__name__, (base,), {"forward": base.forward})


class OnlyNewConstructor(RBFKernel):
    def __init__(self):
        super().__init__(lengthscale_prior=gpytorch.priors.GammaPrior(2.0, 1.0))


class OtherForward(RBFKernel):
    def forward(self, x1, x2, diag=False, **params):
        return super().forward(x1, x2, diag=diag, **params) ** 3


class Cubing:
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs).to_dense() ** 3


class OtherCall(Cubing, RBFKernel):
    pass


class OtherDistance(RBFKernel):
    def covar_dist(self, x1, x2, **params):
        return super().covar_dist(x1.abs(), x2.abs(), **params)


def draw(kernel, dim=2, num_features=64):
    return random_features(
        kernel,
        dim=dim,
        num_features=num_features,
        generator=torch.Generator().manual_seed(0),
        dtype=torch.float64,
    )


def test_a_registered_kernel_has_features():
    kind = another(Laplace)
    assert not has_features(kind())

    @register_features(kind)
    def _(kernel, request):
        cauchy = torch.tan(
            torch.pi * (request.uniform(request.dim, request.num_frequencies) - 0.5)
        )
        return FourierFeatures(cauchy.to(request.like))

    assert has_features(kind())
    assert has_features(ScaleKernel(kind()) + LinearKernel() * kind())
    kernel, x = ScaleKernel(kind(active_dims=[1, 2])), points(20, 3)
    phi = draw(kernel, 3, 40_000).features(x)
    assert (phi @ phi.T - dense(kernel, x)).abs().max() < 0.03


def test_error_names_the_part_that_is_missing_and_shows_how_to_register():
    kernel = ScaleKernel(RBFKernel() + LinearKernel() * PiecewisePolynomialKernel())
    assert not has_features(kernel)
    with pytest.raises(NoRandomFeatures) as caught:
        draw(kernel)
    assert isinstance(caught.value, NotImplementedError)
    message = str(caught.value)
    assert message.startswith("PiecewisePolynomialKernel has no registered feature map")
    assert "@register_features(PiecewisePolynomialKernel)" in message


def test_a_subclass_with_another_constructor_is_the_same_kernel():
    assert has_features(OnlyNewConstructor())
    assert isinstance(draw(OnlyNewConstructor()), FourierFeatures)


@pytest.mark.parametrize("kind", [OtherForward, OtherCall, OtherDistance])
def test_a_subclass_with_other_values_is_another_kernel(kind):
    assert not has_features(kind())
    with pytest.raises(NoRandomFeatures, match=kind.__name__):
        draw(kind())


def test_a_subclass_can_be_registered_itself():
    kind = another(OtherForward)
    assert not has_features(kind())

    @register_features(kind)
    def _(kernel, request):
        frequencies = request.normal(request.dim, request.num_frequencies)
        scale = request.parameter(kernel.lengthscale).T / 3**0.5
        return FourierFeatures((frequencies / scale).to(request.like))

    kernel, x = kind(), points(20, 2)
    phi = draw(kernel, 2, 40_000).features(x)
    assert (phi @ phi.T - dense(kernel, x)).abs().max() < 0.03


def test_parameters_are_read_detached_and_once():
    kernel, x = RBFKernel(), points(3, 2)
    phi = draw(kernel)
    before = phi.features(x)
    assert not before.requires_grad
    kernel.lengthscale = 7.0
    assert torch.equal(before, phi.features(x))


def test_only_kernels_can_be_registered():
    with pytest.raises(TypeError, match="Kernel class"):
        register_features(torch.nn.Linear)


def test_a_builder_has_to_return_a_map():
    kind = another(Laplace)

    @register_features(kind)
    def _(kernel, request):
        return request.normal(request.dim, request.num_frequencies)

    with pytest.raises(TypeError, match="builder of Laplace must return a FeatureMap"):
        draw(kind())


@pytest.mark.parametrize(
    ("kernel", "arguments", "message"),
    [
        (RBFKernel(), {"dim": 0}, "dim: expected at least 1"),
        (RBFKernel(), {"num_features": 0}, "num_features: expected at least 1"),
        (RBFKernel(ard_num_dims=3), {}, "ard_num_dims=3 but sees 2"),
        (RBFKernel(batch_shape=torch.Size([2])), {}, "batch shape"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(kernel, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(kernel, **arguments)


def test_parameters_that_are_not_finite_are_refused():
    kernel = ScaleKernel(MaternKernel())
    kernel.base_kernel.raw_lengthscale.data.fill_(float("nan"))
    with pytest.raises(
        ValueError, match=r"base_kernel\.raw_lengthscale.* must be finite"
    ):
        draw(kernel)
