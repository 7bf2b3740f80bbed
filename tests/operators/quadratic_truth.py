"""Quadratic forms by the dense matrix, and by an operator, and their comparison."""

from __future__ import annotations

from copy import deepcopy

import torch
from gpytorch.kernels import (
    GridInterpolationKernel,
    Kernel,
    MaternKernel,
)

from sgdgp.operators import KernelOperator

# Where GPyTorch itself differentiates the root of a rounding error on the diagonal.
ROUGH = {"matern12", "matern12_2d", "sum_of_products"}


class ExactMatern12(MaternKernel):
    """exp(-r) from differences, with derivative zero at distance zero."""

    def forward(self, x1, x2, diag=False, **params):
        difference = (x1.unsqueeze(-2) - x2.unsqueeze(-3)) / self.lengthscale
        d2 = difference.square().sum(-1)
        apart = d2 > 0
        return torch.exp(-torch.where(apart, d2, 1.0).sqrt() * apart)


def exact(kernel: Kernel) -> Kernel:
    """A copy in float64 whose dense matrix autograd differentiates exactly."""
    kernel = deepcopy(kernel).double()
    for module in kernel.modules():
        if type(module) is MaternKernel and module.nu == 0.5:
            module.__class__ = ExactMatern12
        if isinstance(module, GridInterpolationKernel):
            module.train()
    return kernel


def vectors(n: int, k: int, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, n, k, generator=generator, dtype=torch.float64).to(dtype)


def by_autograd(kernel: Kernel, x, a, b):
    """S, its gradients by name, and dS/dx from the dense matrix in float64."""
    kernel = exact(kernel)
    x = x.double().requires_grad_()
    form = (a.double() * (kernel(x).to_dense() @ b.double())).sum()
    named = {k: p for k, p in kernel.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(form, [*named.values(), x], allow_unused=True)
    gradients = dict(zip([*named, "x"], found, strict=True))
    return form.detach(), {k: g for k, g in gradients.items() if g is not None}


def by_operator(operator: KernelOperator, kernel: Kernel, a, b, form=None):
    x = operator.x.clone().requires_grad_()
    if form is None:
        value = operator.quadratic_form(a, b, x=x)
    else:
        value = form(operator, a, b, x)
    assert value.shape == ()
    assert value.dtype == operator.dtype
    named = {k: p for k, p in kernel.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, [*named.values(), x], allow_unused=True)
    gradients = dict(zip([*named, "x"], found, strict=True))
    return value.detach(), gradients


def agree(found, truth, relative: float) -> None:
    value, gradients = found
    expected_value, expected = truth
    torch.testing.assert_close(
        value.double(),
        expected_value,
        rtol=0,
        atol=relative * (1 + abs(expected_value.item())),
    )
    for name, gradient in expected.items():
        computed = gradients[name]
        if computed is None:
            computed = torch.zeros_like(gradient)
        size = 1 + gradient.abs().max().item()
        torch.testing.assert_close(
            computed.double(),
            gradient,
            rtol=0,
            atol=relative * size,
            msg=lambda text, name=name: f"{name}: {text}",
        )
