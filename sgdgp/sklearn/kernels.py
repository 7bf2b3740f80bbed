"""GPyTorch kernels from names, with a start that suits the data."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import (
    AdditiveKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from jaxtyping import Float
from torch import Tensor


def _logarithmic() -> Positive:
    """Positive, learned as a logarithm: a step is a factor, in whatever units."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


def _stationary(
    base: Callable[..., Kernel], spread: Tensor, variance: float
) -> ScaleKernel:
    dim = len(spread)
    kernel = ScaleKernel(
        base(ard_num_dims=dim, lengthscale_constraint=_logarithmic()),
        outputscale_constraint=_logarithmic(),
    ).to(spread)
    # The squared distance of two points is about 2 d in units of the spread.
    kernel.base_kernel.lengthscale = spread * dim**0.5
    kernel.outputscale = variance
    return kernel


def _linear(spread: Tensor, variance: float) -> LinearKernel:
    kernel = LinearKernel(
        ard_num_dims=len(spread), variance_constraint=_logarithmic()
    ).to(spread)
    kernel.variance = variance / (len(spread) * spread.square())
    return kernel


_KERNELS: dict[str, Callable[[Tensor, float], Kernel]] = {
    "matern12": partial(_stationary, partial(MaternKernel, nu=0.5)),
    "matern32": partial(_stationary, partial(MaternKernel, nu=1.5)),
    "matern52": partial(_stationary, partial(MaternKernel, nu=2.5)),
    "rbf": partial(_stationary, RBFKernel),
    "rq": partial(_stationary, RQKernel),
    "linear": _linear,
}

KERNEL_NAMES = tuple(_KERNELS)
"""Names that can be given for a kernel, alone or as a sum: "linear + matern32"."""


def make_kernel(
    kernel: Kernel | str, spread: Float[Tensor, " d"], variance: float
) -> Kernel:
    """The kernel to learn: a copy of the one given, or a new one of that name.

    Args:
        kernel: A GPyTorch kernel, which is never changed, or a name or a sum of names
            such as "linear + matern32".
        spread: Standard deviation of each input column (d,), where named kernels
            start; its dtype and device are the kernel's.
        variance: Prior variance of named kernels.

    Raises:
        TypeError: Neither a GPyTorch kernel nor a string.
        ValueError: A name is not known, or the kernel does not fit the inputs.
    """
    if isinstance(kernel, Kernel):
        return _fitting(copy.deepcopy(kernel).to(spread), spread)
    if not isinstance(kernel, str):
        raise TypeError(
            "kernel: expected a GPyTorch kernel or a name, found "
            f"{type(kernel).__name__}"
        )
    names = [name.strip() for name in kernel.split("+")]
    unknown = [name for name in names if name not in _KERNELS]
    if unknown:
        known = ", ".join(repr(name) for name in KERNEL_NAMES)
        raise ValueError(
            f"kernel: expected one of {known} or a sum of them, found {kernel!r}"
        )
    share = variance / len(names)
    terms = [_KERNELS[name](spread, share) for name in names]
    return terms[0] if len(terms) == 1 else AdditiveKernel(*terms)


def _fitting(kernel: Kernel, spread: Tensor) -> Kernel:
    """The kernel, if it can be evaluated at inputs with so many columns."""
    if kernel.batch_shape:
        raise ValueError(
            "kernel: expected one without batch shape, found batch shape "
            f"{tuple(kernel.batch_shape)}"
        )
    try:
        with torch.no_grad():
            kernel(spread.unsqueeze(0)).to_dense()
    except (RuntimeError, IndexError) as error:
        raise ValueError(
            f"kernel: cannot be evaluated at inputs with {len(spread)} columns: {error}"
        ) from error
    return kernel
