"""One linear system (K + s I) V = B that the solvers are raced on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from gpytorch.kernels import Kernel, MaternKernel, RBFKernel, ScaleKernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.slices import slices
from sgdgp.operators import TiledOperator

_SLAB_ENTRIES = 2**25

KernelKind: TypeAlias = Literal["matern32", "rbf"]


@dataclass(frozen=True)
class KernelValues:
    """A scaled stationary kernel, as plain numbers.

    Attributes:
        kind: ``"matern32"`` or ``"rbf"``.
        variance: Prior variance.
        lengthscale: One per input (d,).
    """

    kind: KernelKind
    variance: float
    lengthscale: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in get_args(KernelKind):
            raise ValueError(
                f"kind: found {self.kind!r}, expected one of {get_args(KernelKind)}"
            )

    def build(self, like: Tensor) -> Kernel:
        """The GPyTorch kernel in the dtype and on the device of ``like``."""
        d = len(self.lengthscale)
        base = (
            MaternKernel(nu=1.5, ard_num_dims=d)
            if self.kind == "matern32"
            else RBFKernel(ard_num_dims=d)
        )
        kernel = ScaleKernel(base).to(like)
        # As tensors: GPyTorch rounds plain floats to float32 on the way.
        kernel.outputscale = like.new_tensor(self.variance)
        base.lengthscale = like.new_tensor(self.lengthscale)
        return kernel.requires_grad_(False).eval()


@dataclass(frozen=True)
class Problem:
    """(K + noise I) V = rhs.

    Attributes:
        name: As on the command line.
        kernel: What K is made of.
        x: Inputs (n, d).
        noise: Noise variance.
        rhs: Targets, then pathwise samples f_s(X) + eps_s (n, k).
        noise_draws: eps_s, zero for the targets (n, k).
        facts: What is known of it: condition number, how it was drawn.
    """

    name: str
    kernel: KernelValues
    x: Float[Tensor, "n d"]
    noise: float
    rhs: Float[Tensor, "n k"]
    noise_draws: Float[Tensor, "n k"]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.noise > 0:
            raise ValueError(f"noise: found {self.noise}, expected a positive variance")

    @property
    def n(self) -> int:
        """Number of equations."""
        return self.x.shape[0]

    def build_kernel(self) -> Kernel:
        """The kernel in the problem's dtype."""
        return self.kernel.build(self.x)

    def head(self, size: int) -> Problem:
        """The first equations only, to warm up on."""
        rows = slice(0, min(size, self.n))
        return replace(
            self, x=self.x[rows], rhs=self.rhs[rows], noise_draws=self.noise_draws[rows]
        )

    def true_residuals(self, weights: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        """||b - (K + s I) v|| / ||b|| of every column (k,), all of it in float64.

        K is the kernel of the problem's own (rounded) inputs and parameters,
        evaluated and summed in float64 and streamed in tiles: O(n k) memory.
        """
        operator = TiledOperator(self.build_kernel(), self.x).to(torch.float64)
        v, rhs = weights.double(), self.rhs.double()
        squares = rhs.new_zeros(rhs.shape[1])
        for rows in slices(self.n, operator.rows_per_step):
            product = operator.rows(rows).matmul(v).add_(v[rows], alpha=self.noise)
            squares += (rhs[rows] - product).square().sum(0)
        return squares.sqrt() / rhs.norm(dim=0)

    def save(self, path: Path) -> None:
        """Write it to a file for the processes that race on it."""
        torch.save(
            {
                "name": self.name,
                "kernel": (
                    self.kernel.kind,
                    self.kernel.variance,
                    list(self.kernel.lengthscale),
                ),
                "x": self.x,
                "noise": self.noise,
                "rhs": self.rhs,
                "noise_draws": self.noise_draws,
                "facts": dict(self.facts),
            },
            path,
        )

    @classmethod
    def load(cls, path: Path) -> Problem:
        """Read what ``save`` wrote."""
        found = torch.load(path, weights_only=True)
        kind, variance, lengthscale = found.pop("kernel")
        return cls(kernel=KernelValues(kind, variance, tuple(lengthscale)), **found)


@torch.no_grad()
def dense_kernel(kernel: Kernel, x: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    """K from GPyTorch itself, a slab of rows at a time: no more memory than K."""
    entries = x.new_empty(len(x), len(x))
    for rows in slices(len(x), max(1, _SLAB_ENTRIES // len(x))):
        entries[rows] = kernel(x[rows], x).to_dense()
    return entries
