"""Every kernel that is said to work, with inputs that suit it. Any other is welcome:
products, blocks, gradients, formulas and features are tested for all of CASES.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from botorch.models.kernels.positive_index import PositiveIndexKernel
from gpytorch.kernels import (
    AdditiveKernel,
    ArcKernel,
    ConstantKernel,
    CosineKernel,
    CylindricalKernel,
    GridInterpolationKernel,
    HammingIMQKernel,
    IndexKernel,
    Kernel,
    LCMKernel,
    LinearKernel,
    Matern52KernelGrad,
    MaternKernel,
    MultitaskKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    PolynomialKernelGrad,
    ProductKernel,
    RBFKernel,
    RBFKernelGrad,
    RFFKernel,
    RQKernel,
    ScaleKernel,
    SpectralDeltaKernel,
    SpectralMixtureKernel,
)
from gpytorch.priors import GammaPrior
from torch import Tensor

from examples.wendland import WendlandKernel


class L1Kernel(Kernel):
    """A user's kernel, exp(-|x - x'|_1 / l)."""

    has_lengthscale = True

    def forward(self, x1, x2, diag=False, **params):
        if diag:
            return torch.exp(-((x1 - x2) / self.lengthscale).abs().sum(-1))
        return torch.exp(-torch.cdist(x1 / self.lengthscale, x2 / self.lengthscale, 1))


class SquaredMatern(MaternKernel):
    """A user's subclass that overrides forward."""

    def forward(self, x1, x2, diag=False, **params):
        return super().forward(x1, x2, diag=diag, **params) ** 2


def gaussian(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, d, generator=generator, dtype=torch.float64)


def unit_ball(n: int, d: int, generator: torch.Generator) -> Tensor:
    x = gaussian(n, d, generator)
    radius = torch.rand(n, 1, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    return x / x.norm(dim=1, keepdim=True) * radius


def tasks(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 4, (n, 1), generator=generator).double()


def with_tasks(n: int, d: int, generator: torch.Generator) -> Tensor:
    return torch.cat([gaussian(n, d - 1, generator), tasks(n, d, generator)], 1)


def one_hot(n: int, d: int, generator: torch.Generator) -> Tensor:
    letters = torch.randint(0, 3, (n, d), generator=generator)
    return torch.nn.functional.one_hot(letters, 3).reshape(n, -1).double()


@dataclass(frozen=True)
class Case:
    """A kernel and its inputs.

    ``tiled`` says whether a fast form exists for it.
    """

    build: Callable[[int], Kernel]
    tiled: bool = False
    d: int = 5
    inputs: Callable[[int, int, torch.Generator], Tensor] = gaussian

    def kernel(self, seed: int = 0, d: int | None = None) -> Kernel:
        """The kernel in float64 with hyperparameters away from their defaults."""
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            kernel = self.build(self.d if d is None else d).double().eval()
        with torch.no_grad():
            for name, parameter in kernel.named_parameters():
                noise = torch.rand(
                    parameter.shape, generator=generator, dtype=torch.float64
                )
                shift = 1.0 if "lengthscale" in name else 0.0
                parameter.add_(noise + shift)
        return kernel

    def x(self, n: int, seed: int = 0, d: int | None = None) -> Tensor:
        """Inputs (n, d) in float64."""
        generator = torch.Generator().manual_seed(seed + 1000)
        return self.inputs(n, self.d if d is None else d, generator)


def _arc(d: int) -> Kernel:
    return ArcKernel(
        MaternKernel(2.5),
        angle_prior=GammaPrior(0.5, 1.0),
        radius_prior=GammaPrior(3.0, 2.0),
        ard_num_dims=d,
    )


def _nested_active_dims(d: int) -> Kernel:
    # Every node with dims of its own, the Scale and its base both (the base's are
    # the ones that count, and only once).
    inner = AdditiveKernel(
        MaternKernel(1.5, active_dims=(1, 0)),
        ScaleKernel(RBFKernel(active_dims=(2,))),
    )
    product = ProductKernel(inner, LinearKernel(active_dims=(0, 2)))
    return ScaleKernel(product, active_dims=(d - 1, 1, 0)) + ScaleKernel(
        ScaleKernel(PeriodicKernel(active_dims=(3, 0))), active_dims=(3, 0)
    )


CASES: dict[str, Case] = {
    "rbf": Case(lambda d: RBFKernel(), tiled=True),
    "rbf_ard": Case(lambda d: RBFKernel(ard_num_dims=d), tiled=True),
    "rbf_1d": Case(lambda d: RBFKernel(), tiled=True, d=1),
    "matern12": Case(lambda d: MaternKernel(0.5), tiled=True),
    "matern12_2d": Case(lambda d: MaternKernel(0.5), tiled=True, d=2),
    "matern32": Case(lambda d: MaternKernel(1.5), tiled=True),
    "matern32_ard": Case(
        lambda d: ScaleKernel(MaternKernel(1.5, ard_num_dims=d)), tiled=True
    ),
    "matern32_ard_3d": Case(
        lambda d: ScaleKernel(MaternKernel(1.5, ard_num_dims=d)), tiled=True, d=3
    ),
    "matern52": Case(lambda d: MaternKernel(2.5, ard_num_dims=d), tiled=True),
    "rq": Case(lambda d: RQKernel(ard_num_dims=d), tiled=True),
    "periodic": Case(lambda d: PeriodicKernel(), tiled=True),
    "periodic_ard": Case(lambda d: PeriodicKernel(ard_num_dims=d), tiled=True),
    "linear": Case(lambda d: LinearKernel(), tiled=True),
    "linear_ard": Case(lambda d: LinearKernel(ard_num_dims=d), tiled=True),
    "constant": Case(lambda d: ConstantKernel(), tiled=True),
    "quadratic": Case(lambda d: PolynomialKernel(power=2), tiled=True),
    "cubic": Case(lambda d: PolynomialKernel(power=3), tiled=True),
    "sum": Case(
        lambda d: ScaleKernel(RBFKernel()) + LinearKernel() + ConstantKernel(),
        tiled=True,
    ),
    "product": Case(
        lambda d: ScaleKernel(RBFKernel()) * PeriodicKernel() * MaternKernel(2.5),
        tiled=True,
    ),
    "sum_of_products": Case(
        lambda d: (
            ScaleKernel(RBFKernel() * (LinearKernel() + ScaleKernel(MaternKernel(0.5))))
            + PolynomialKernel(2) * RQKernel()
        ),
        tiled=True,
    ),
    "active_dims": Case(lambda d: RBFKernel(active_dims=(3, 1)), tiled=True),
    "nested_active_dims": Case(_nested_active_dims, tiled=True),
    "cosine": Case(lambda d: CosineKernel()),
    "spectral_mixture": Case(lambda d: SpectralMixtureKernel(3, ard_num_dims=d), d=2),
    "spectral_delta": Case(lambda d: SpectralDeltaKernel(num_dims=d, num_deltas=8)),
    "piecewise_polynomial": Case(lambda d: PiecewisePolynomialKernel(q=2)),
    "rff": Case(lambda d: RFFKernel(num_samples=16, num_dims=d)),
    "cylindrical": Case(
        lambda d: CylindricalKernel(3, MaternKernel(2.5)), inputs=unit_ball
    ),
    "arc": Case(_arc),
    "index": Case(
        lambda d: IndexKernel(num_tasks=4, rank=2), tiled=True, d=1, inputs=tasks
    ),
    "scaled_index": Case(
        lambda d: ScaleKernel(IndexKernel(num_tasks=4, rank=2)),
        tiled=True,
        d=1,
        inputs=tasks,
    ),
    "index_product": Case(
        lambda d: RBFKernel(active_dims=(0, 1)) * IndexKernel(4, 2, active_dims=(2,)),
        tiled=True,
        d=3,
        inputs=with_tasks,
    ),
    "index_sum_of_products": Case(
        lambda d: (
            RBFKernel(active_dims=(0, 1)) * IndexKernel(4, 1, active_dims=(2,))
            + MaternKernel(1.5, active_dims=(0,)) * IndexKernel(4, 3, active_dims=(2,))
        ),
        tiled=True,
        d=3,
        inputs=with_tasks,
    ),
    "positive_index": Case(
        lambda d: (
            RBFKernel(active_dims=(0,)) * PositiveIndexKernel(4, 2, active_dims=(2,))
        ),
        tiled=True,
        d=3,
        inputs=with_tasks,
    ),
    "grid_interpolation": Case(
        lambda d: GridInterpolationKernel(RBFKernel(), grid_size=20, num_dims=d), d=2
    ),
    "hamming_imq": Case(lambda d: HammingIMQKernel(vocab_size=3), inputs=one_hot),
    "multitask": Case(lambda d: MultitaskKernel(RBFKernel(), num_tasks=2)),
    "lcm": Case(lambda d: LCMKernel([MaternKernel(), RBFKernel()], 2, rank=1)),
    "rbf_grad": Case(lambda d: RBFKernelGrad(), d=3),
    "matern52_grad": Case(lambda d: Matern52KernelGrad(), d=2),
    "polynomial_grad": Case(lambda d: PolynomialKernelGrad(power=2), d=2),
    "user_l1": Case(lambda d: L1Kernel()),
    "user_wendland": Case(
        lambda d: ScaleKernel(WendlandKernel(ard_num_dims=d)), tiled=True, d=3
    ),
    "user_subclass": Case(lambda d: SquaredMatern(1.5)),
    "sum_with_unknown": Case(lambda d: ScaleKernel(L1Kernel()) + RBFKernel()),
}

TILED = sorted(name for name, case in CASES.items() if case.tiled)


def tolerance(truth: Tensor, dtype: torch.dtype) -> float:
    """Rounding that float64 or float32 explains; formulas that differ do not."""
    size = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
    return size * (1e-11 if dtype == torch.float64 else 3e-5) * math.sqrt(10)
