"""The door for kernels of one's own: tiles, gradients and features in one call."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gpytorch.kernels import (
    IndexKernel,
    Kernel,
    LinearKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)

import sgdgp
from sgdgp.features import FourierFeatures, has_features
from sgdgp.kernels import (
    InnerProductTile,
    StationaryTile,
    differentiable_tile,
    register_kernel,
    register_tile_gradient,
    register_tile_kernel,
    scalar,
    tile_kernel,
)
from sgdgp.kernels.dot_product import PolynomialTile
from sgdgp.kernels.stationary import (
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    PeriodicTile,
    RationalQuadraticTile,
    RBFTile,
)
from sgdgp.operators import TiledOperator
from sgdgp.training import StandardProbes
from tests.models import gp
from tests.operators.kernel_cases import gaussian


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def gradients_agree(kernel, x):
    """Through the operator, and through GPyTorch's dense matrix."""
    a, b = torch.randn(2, x.shape[0], 3, generator=generator(), dtype=x.dtype)
    parameters = list(kernel.parameters())
    form = TiledOperator(kernel, x).quadratic_form(a, b)
    truth = (a * (kernel(x).to_dense() @ b)).sum()
    torch.testing.assert_close(form, truth)
    torch.testing.assert_close(
        torch.autograd.grad(form, parameters),
        torch.autograd.grad(truth, parameters),
        rtol=1e-9,
        atol=1e-9,
    )


def test_a_tile_without_a_gradient_rule_is_differentiated_by_autograd():
    class Halved(RBFKernel):
        def forward(self, x1, x2, diag=False, **params):
            return 0.5 * super().forward(x1, x2, diag=diag, **params)

    @register_tile_kernel(Halved)
    def _(kernel, dims):
        return RBFTile(0.5, dims, kernel.lengthscale.detach()[0].reciprocal())

    kernel = (ScaleKernel(Halved()) + LinearKernel()).double()
    assert tile_kernel(kernel) is not None
    assert differentiable_tile(kernel) is None
    gradients_agree(kernel, gaussian(12, 5, generator()))


def test_a_registered_gradient_is_used_inside_sums_products_and_scales(monkeypatch):
    class Quartered(RBFKernel):
        def forward(self, x1, x2, diag=False, **params):
            return 0.25 * super().forward(x1, x2, diag=diag, **params)

    @register_tile_kernel(Quartered)
    def _(kernel, dims):
        return RBFTile(0.25, dims, kernel.lengthscale.detach()[0].reciprocal())

    @register_tile_gradient(Quartered)
    def _(kernel, dims):
        return RBFTile(0.25, dims, kernel.lengthscale[0].reciprocal())

    x = gaussian(12, 5, generator())
    inner = Quartered(active_dims=(2, 0)) * LinearKernel() + Quartered()
    kernel = ScaleKernel(inner).double()
    assert differentiable_tile(kernel) is not None
    gradients_agree(kernel, x)


def test_rules_for_subclasses_with_the_same_forward_end_where_it_is_overridden():
    class Wide(RBFKernel):
        pass

    class Wider(Wide):
        @property
        def lengthscale(self):
            return 2 * self.raw_lengthscale_constraint.transform(self.raw_lengthscale)

    class Squared(Wide):
        def forward(self, x1, x2, diag=False, **params):
            return super().forward(x1, x2, diag=diag, **params).square()

    @register_tile_kernel(Wide, same_forward=True)
    def _(kernel, dims):
        return RBFTile(1.0, dims, kernel.lengthscale.detach()[0].reciprocal())

    @register_tile_gradient(Wide, same_forward=True)
    def _(kernel, dims):
        return RBFTile(1.0, dims, kernel.lengthscale[0].reciprocal())

    x = gaussian(12, 5, generator())
    for kernel in (Wide().double(), Wider().double()):
        assert differentiable_tile(kernel) is not None
        gradients_agree(kernel, x)
    assert tile_kernel(Squared()) is None
    assert differentiable_tile(Squared()) is None


def test_an_inner_product_of_features_needs_no_derivatives_of_its_own():
    class Coregionalisation(IndexKernel):
        """A covariance between tasks, by its table."""

    @dataclass(frozen=True)
    class TableTile(InnerProductTile):
        dims: torch.Tensor | None
        table: torch.Tensor

        def _tasks(self, x):
            column = x if self.dims is None else x[:, self.dims]
            return column[:, 0].long()

        def left(self, x, origin):
            return (self.table[self._tasks(x)],)

        def right(self, x, origin):
            return (torch.eye(self.table.shape[0]).to(x)[self._tasks(x)],)

        def tile_diagonal(self, x):
            return self.table.diagonal()[self._tasks(x)]

    def table(kernel):
        diagonal = torch.diag(kernel.var)
        return kernel.covar_factor @ kernel.covar_factor.T + diagonal

    def tile(kernel, dims):
        return TableTile(1.0, dims, table(kernel))

    register_kernel(Coregionalisation, tile=tile)

    task_kernel = Coregionalisation(num_tasks=3, rank=2, active_dims=(4,))
    with torch.no_grad():
        task_kernel.covar_factor.copy_(torch.randn(3, 2, generator=generator()))
    kernel = (ScaleKernel(RBFKernel(active_dims=(0, 1, 2, 3))) * task_kernel).double()
    x = gaussian(14, 5, generator())
    x[:, 4] = torch.randint(0, 3, (14,), generator=generator()).double()
    assert differentiable_tile(kernel) is not None
    gradients_agree(kernel, x)


def test_a_tile_that_knows_no_derivative_is_differentiated_by_autograd():
    class Same(RBFKernel):
        pass

    class OnlyValues(RBFTile):
        def bind(self, x, origin):
            return None

    def tile(kernel, dims):
        return OnlyValues(1.0, dims, kernel.lengthscale[0].reciprocal())

    register_kernel(Same, tile=tile)
    kernel = (ScaleKernel(Same() * LinearKernel()) + RBFKernel()).double()
    assert differentiable_tile(kernel) is not None
    gradients_agree(kernel, gaussian(12, 5, generator()))


class OnlyValues(StationaryTile):
    """exp(-d2)."""

    def profile(self, d2, scratch):
        d2.neg_().exp_()


def test_a_profile_without_its_derivative_is_differentiated_by_autograd():
    class Gauss(RBFKernel):
        """exp(-r^2 / 2)."""

    def tile(kernel, dims):
        return OnlyValues(1.0, dims, 0.5**0.5 / kernel.lengthscale[0])

    class Cosh(InnerProductTile):
        def left(self, x, origin):
            return (x,)

        right = left

        def profile(self, u):
            u.cosh_()

        def tile_diagonal(self, x):
            return x.square().sum(1).cosh()

    class CoshKernel(Kernel):
        def forward(self, x1, x2, diag=False, **params):
            product = (x1 * x2).sum(-1) if diag else x1 @ x2.mT
            return product.cosh()

    register_kernel(Gauss, tile=tile)
    register_kernel(CoshKernel, tile=lambda kernel, dims: Cosh(1.0))
    kernel = (ScaleKernel(Gauss() * LinearKernel()) + CoshKernel()).double()
    gradients_agree(kernel, gaussian(12, 5, generator()) / 3)
    fitted, few = Gauss(), StandardProbes(4)
    model = gp(ScaleKernel(fitted), n=40)
    before = fitted.lengthscale.item()
    sgdgp.fit(model, steps=2, probes=few, operator="tiled", progress=False)
    assert fitted.lengthscale.item() != before


@pytest.mark.parametrize("surround", [ScaleKernel, lambda k: k + RBFKernel()])
def test_a_parameter_that_tiles_leave_out_has_the_gradient_of_autograd(surround):
    class Power(RBFKernel):
        """exp(-alpha r^2 / 2)."""

        def __init__(self):
            super().__init__()
            self.register_parameter("alpha", torch.nn.Parameter(torch.tensor(0.7)))

        def forward(self, x1, x2, diag=False, **params):
            return super().forward(x1, x2, diag=diag, **params) ** self.alpha

    @dataclass(frozen=True)
    class PowerTile(RBFTile):
        alpha: float | torch.Tensor

        def profile(self, d2, scratch):
            super().profile(d2.mul_(float(self.alpha)), scratch)

        def profile_with_derivative(self, d2, derivative, scratch, same):
            super().profile_with_derivative(
                d2.mul_(float(self.alpha)), derivative, scratch, same
            )
            derivative.mul_(float(self.alpha))

    def tile(kernel, dims):
        inverse = kernel.lengthscale[0].reciprocal()
        return PowerTile(1.0, dims, inverse, scalar(kernel.alpha))

    register_kernel(Power, tile=tile)
    kernel = surround(Power()).double()
    gradients_agree(kernel, gaussian(12, 5, generator()))


def test_a_tile_with_a_constructor_of_its_own_is_refused():
    with pytest.raises(TypeError, match="Own: expected a frozen dataclass"):

        class Own(RBFTile):
            def __init__(self, alpha):
                self.alpha = alpha


@pytest.mark.parametrize("kernel_type", [3, RBFKernel(), dict])
@pytest.mark.parametrize(
    "register",
    [
        register_tile_kernel,
        register_tile_gradient,
        lambda kernel_type: register_kernel(kernel_type, tile=lambda k, dims: None),
    ],
)
def test_only_classes_of_kernels_are_registered(register, kernel_type):
    with pytest.raises(TypeError, match="kernel_type must be a Kernel class, found"):
        register(kernel_type)


def test_a_registration_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match="RBFKernel: expected tile or features"):
        register_kernel(RBFKernel)


def test_one_call_says_tile_gradient_and_features():
    class Wide(RBFKernel):
        def forward(self, x1, x2, diag=False, **params):
            return super().forward(x1 / 2, x2 / 2, diag=diag, **params)

    def tile(kernel, dims):
        return RBFTile(1.0, dims, 0.5 / kernel.lengthscale[0])

    def features(kernel, request):
        omega = request.normal(request.dim, request.num_frequencies)
        scale = 2 * request.parameter(kernel.lengthscale).T
        return FourierFeatures((omega / scale).to(request.like))

    assert not has_features(Wide())
    register_kernel(Wide, tile=tile, features=features)
    assert has_features(ScaleKernel(Wide()) + LinearKernel())
    gradients_agree(Wide(ard_num_dims=5).double(), gaussian(12, 5, generator()))


def test_a_tile_form_holds_the_hyperparameters_of_its_moment():
    kernel = ScaleKernel(RQKernel())
    found, graph = tile_kernel(kernel), differentiable_tile(kernel)
    assert isinstance(found.factor, float)
    assert not found.inverse_lengthscale.requires_grad
    assert graph.factor.requires_grad
    assert graph.alpha.requires_grad
    kernel.outputscale = 9.0
    assert found.factor != pytest.approx(9.0)


_ONE = torch.ones(1)


@pytest.mark.parametrize(
    "tile",
    [
        RBFTile(1.0, None, _ONE),
        Matern12Tile(1.0, None, _ONE),
        Matern32Tile(1.0, None, _ONE),
        Matern52Tile(1.0, None, _ONE),
        RationalQuadraticTile(1.0, None, _ONE, 1.7),
    ],
    ids=lambda tile: type(tile).__name__,
)
def test_profiles_come_with_their_derivatives(tile):
    d2 = torch.linspace(0.01, 30.0, 300, dtype=torch.float64).view(1, -1)

    def evaluate(d2):
        value, derivative, scratch = d2.clone(), *torch.empty(2, *d2.shape).to(d2)
        tile.profile_with_derivative(value, derivative, scratch, torch.zeros(1, 1))
        return value, derivative * tile.derivative_scale

    profile = d2.clone()
    tile.profile(profile, (torch.empty_like(d2),))
    torch.testing.assert_close(evaluate(d2)[0], profile, rtol=1e-12, atol=1e-13)
    is_derivative(evaluate, d2)


@pytest.mark.parametrize(
    "tile",
    [
        PeriodicTile(1.0, None, _ONE, _ONE),
        PolynomialTile(1.0, None, 0.0, 3.0),
        PolynomialTile(1.0, None, 0.0, 1.0),
    ],
)
def test_profiles_of_inner_products_come_with_their_derivatives(tile):
    u = torch.linspace(-4.0, -0.01, 100, dtype=torch.float64).view(1, -1)

    def evaluate(u):
        value, derivative = u.clone(), torch.empty_like(u)
        tile.profile_with_derivative(value, derivative)
        return value, derivative * tile.derivative_scale

    profile = u.clone()
    tile.profile(profile)
    torch.testing.assert_close(evaluate(u)[0], profile, rtol=1e-12, atol=1e-13)
    is_derivative(evaluate, u)


def is_derivative(evaluate, u: torch.Tensor) -> None:
    """The second of what is returned is the derivative of the first."""
    step = 1e-6
    above, below = (evaluate(u + sign * step)[0] for sign in (1, -1))
    difference = (above - below) / (2 * step)
    torch.testing.assert_close(evaluate(u)[1], difference, rtol=1e-6, atol=1e-8)
