"""The door for kernels of one's own: analytic gradients when a rule says how."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gpytorch.kernels import IndexKernel, LinearKernel, RBFKernel, ScaleKernel

from sgdgp.kernels.gradient_terms import LiveInnerProduct, LiveStationary
from sgdgp.kernels.registry import TileKernel
from sgdgp.kernels.slopes import (
    Matern12Slope,
    Matern32Slope,
    Matern52Slope,
    PeriodicSlope,
    PowerSlope,
    RationalQuadraticSlope,
    RBFSlope,
    Slope,
)
from sgdgp.kernels.stationary import (
    Matern12Tile,
    Matern32Tile,
    Matern52Tile,
    RationalQuadraticTile,
    RBFTile,
)
from sgdgp.kernels.tile_gradients import live_tile
from sgdgp.operators import (
    TiledOperator,
    register_tile_gradient,
    register_tile_kernel,
    tile_kernel,
)
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
    assert live_tile(kernel) is None
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
        tile = RBFTile(1.0, dims, kernel.lengthscale[0].reciprocal())
        return LiveStationary(0.25, tile, RBFSlope())

    x = gaussian(12, 5, generator())
    inner = Quartered(active_dims=(2, 0)) * LinearKernel() + Quartered()
    kernel = ScaleKernel(inner).double()
    assert live_tile(kernel) is not None
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
        tile = RBFTile(1.0, dims, kernel.lengthscale[0].reciprocal())
        return LiveStationary(1.0, tile, RBFSlope())

    x = gaussian(12, 5, generator())
    for kernel in (Wide().double(), Wider().double()):
        assert live_tile(kernel) is not None
        gradients_agree(kernel, x)
    assert tile_kernel(Squared()) is None
    assert live_tile(Squared()) is None


def test_an_inner_product_of_features_needs_no_derivatives_of_its_own():
    class Coregionalisation(IndexKernel):
        """A covariance between tasks, by its table."""

    @dataclass(frozen=True)
    class TableTile(TileKernel):
        dims: torch.Tensor | None
        table: torch.Tensor

        def _tasks(self, x):
            column = x if self.dims is None else x[:, self.dims]
            return column[:, 0].long()

        def left(self, x, origin):
            return (self.table[self._tasks(x)],)

        def right(self, x, origin):
            return (torch.eye(self.table.shape[0]).to(x)[self._tasks(x)],)

        def tile(self, left, right, out, scratch):
            torch.mm(left[0], right[0].T, out=out)

        def tile_diagonal(self, x):
            return self.table.diagonal()[self._tasks(x)]

    def table(kernel):
        diagonal = torch.diag(kernel.var)
        return kernel.covar_factor @ kernel.covar_factor.T + diagonal

    @register_tile_kernel(Coregionalisation)
    def _(kernel, dims):
        return TableTile(1.0, dims, table(kernel).detach())

    @register_tile_gradient(Coregionalisation)
    def _(kernel, dims):
        return LiveInnerProduct(1.0, TableTile(1.0, dims, table(kernel)))

    task_kernel = Coregionalisation(num_tasks=3, rank=2, active_dims=(4,))
    with torch.no_grad():
        task_kernel.covar_factor.copy_(torch.randn(3, 2, generator=generator()))
    kernel = (ScaleKernel(RBFKernel(active_dims=(0, 1, 2, 3))) * task_kernel).double()
    x = gaussian(14, 5, generator())
    x[:, 4] = torch.randint(0, 3, (14,), generator=generator()).double()
    assert live_tile(kernel) is not None
    gradients_agree(kernel, x)


_ONE = torch.ones(1)
_ALPHA = torch.tensor(1.7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("slope", "tile"),
    [
        (RBFSlope(), RBFTile(1.0, None, _ONE)),
        (Matern12Slope(), Matern12Tile(1.0, None, _ONE)),
        (Matern32Slope(), Matern32Tile(1.0, None, _ONE)),
        (Matern52Slope(), Matern52Tile(1.0, None, _ONE)),
        (
            RationalQuadraticSlope(_ALPHA),
            RationalQuadraticTile(1.0, None, _ONE, 1.7),
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_are_those_of_the_profile_and_slopes_their_derivatives(slope, tile):
    d2 = torch.linspace(0.01, 30.0, 300, dtype=torch.float64).view(1, -1)
    value, derivative = evaluate(slope, d2)
    profile = d2.clone()
    tile.profile(profile, (torch.empty_like(d2),))
    torch.testing.assert_close(value, profile, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(derivative, differences(slope, d2), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("slope", [PeriodicSlope(), PowerSlope(3.0), PowerSlope(1.0)])
def test_slopes_of_inner_products_are_their_derivatives(slope):
    u = torch.linspace(-4.0, -0.01, 100, dtype=torch.float64).view(1, -1)
    _, derivative = evaluate(slope, u)
    torch.testing.assert_close(derivative, differences(slope, u), rtol=1e-6, atol=1e-8)


def evaluate(slope: Slope, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    value, derivative = u.clone(), torch.empty_like(u)
    slope.evaluate(value, derivative, torch.empty_like(u), torch.zeros_like(u[:, :1]))
    return value, derivative * slope.constant


def differences(slope: Slope, u: torch.Tensor) -> torch.Tensor:
    step = 1e-6
    above, below = (evaluate(slope, u + sign * step)[0] for sign in (1, -1))
    return (above - below) / (2 * step)
