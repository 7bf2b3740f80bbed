"""scikit-learn's kernels as GPyTorch's, and hyperparameters as scikit-learn has them.

What scikit-learn calls theta are the logarithms of the hyperparameters that are not
fixed. Each is a power of a GPyTorch parameter, which is behind a constraint.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import singledispatch
from typing import Any, NamedTuple

import numpy as np
import torch
from gpytorch.constraints import Interval, Positive
from gpytorch.kernels import (
    AdditiveKernel,
    ConstantKernel,
    Kernel,
    LinearKernel,
    MaternKernel,
    PeriodicKernel,
    ProductKernel,
    RBFKernel,
    RQKernel,
)
from sklearn.gaussian_process import kernels as theirs
from torch import Tensor

from sgdgp.core.checks import check_positive


def logarithmic() -> Positive:
    """Positive, learned as a logarithm: a step is a factor, in whatever units."""
    return Positive(transform=torch.exp, inv_transform=torch.log)


class Hyperparameter(NamedTuple):
    """A power of a GPyTorch parameter.

    Attributes:
        raw: The parameter before its constraint.
        constraint: Its constraint.
        power: The parameter is the hyperparameter to the power of this.
    """

    raw: Tensor
    constraint: Interval
    power: float = 1.0

    @property
    def theta(self) -> Tensor:
        """The logarithms, flat, with a graph to ``raw``."""
        return self.constraint.transform(self.raw).log().flatten() / self.power

    def slope(self, gradient: Tensor) -> Tensor:
        """A gradient with respect to ``raw`` as one with respect to the logarithms."""
        raw = self.raw.detach().requires_grad_()
        (own,) = torch.autograd.grad(self._replace(raw=raw).theta.sum(), raw)
        return (gradient / own).flatten()

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Set the parameter to these logarithms."""
        value = (self.power * theta).exp().to(self.raw).reshape(self.raw.shape)
        self.raw.copy_(self.constraint.inverse_transform(value))


@dataclass(frozen=True)
class Translated:
    """A kernel of scikit-learn in GPyTorch.

    Attributes:
        kernel: The kernel without noise.
        hyperparameters: By the names that scikit-learn has for them, the fixed too.
        white: Name of the noise's own, if there is a ``WhiteKernel``.
        noise: Its noise variance, None without one.
        learns_noise: Whether the noise is to be learned.
    """

    kernel: Kernel
    hyperparameters: Mapping[str, Hyperparameter]
    white: str | None
    noise: float | None
    learns_noise: bool

    def learned(self, given: theirs.Kernel, noise: float | None) -> theirs.Kernel:
        """The given kernel with hyperparameters and noise as they are here now."""
        logarithms = {
            name: each.theta.detach().cpu().numpy()
            for name, each in self.hyperparameters.items()
        }
        if self.white is not None and noise is not None:
            logarithms[self.white] = np.array([math.log(noise)])
        free = [logarithms[each.name] for each in free_of(given)]
        return given.clone_with_theta(np.concatenate([np.zeros(0), *free]))


def free_of(kernel: theirs.Kernel) -> list[Any]:
    """scikit-learn's hyperparameters that are not fixed, in the order of theta."""
    return [each for each in kernel.hyperparameters if not each.fixed]


def translate(kernel: theirs.Kernel, like: Tensor) -> Translated:
    """The same kernel in GPyTorch, at its values; what is fixed needs no gradient.

    Bounds other than "fixed" are not taken over.

    Args:
        kernel: A kernel of scikit-learn.
        like: Of the dtype, on the device and with as many entries as inputs have
            columns (d,).

    Raises:
        TypeError: There is no such kernel in GPyTorch; names it.
        ValueError: Its length scales do not fit the inputs.
    """
    terms = list(_terms(kernel, ""))
    white = [(name, term) for name, term in terms if _is_white(term)]
    rest = [(name, term) for name, term in terms if not _is_white(term)]
    if len(white) > 1 or not rest:
        raise TypeError(
            f"kernel: expected at most one WhiteKernel beside others, found {kernel}"
        )
    found: dict[str, Hyperparameter] = {}
    with like.device:  # whatever torch's default device is
        parts = [_kernel(term, name, like, found) for name, term in rest]
    whole = parts[0] if len(parts) == 1 else AdditiveKernel(*parts)
    fixed = {each.name for each in kernel.hyperparameters if each.fixed}
    for name, each in found.items():
        each.raw.requires_grad_(name not in fixed)
    if not white:
        return Translated(whole, found, None, None, True)
    name, level = f"{white[0][0]}noise_level", white[0][1].noise_level
    check_positive(f"kernel: {name}", level)
    return Translated(whole, found, name, level, name not in fixed)


def _terms(kernel: theirs.Kernel, prefix: str) -> Iterator[tuple[str, theirs.Kernel]]:
    """The terms of a sum of sums, with the prefix of their hyperparameters' names."""
    if type(kernel) is theirs.Sum:
        yield from _terms(kernel.k1, f"{prefix}k1__")
        yield from _terms(kernel.k2, f"{prefix}k2__")
    else:
        yield prefix, kernel


def _is_white(kernel: theirs.Kernel) -> bool:
    return type(kernel) is theirs.WhiteKernel


def _kernel(
    kernel: theirs.Kernel, prefix: str, like: Tensor, found: dict[str, Hyperparameter]
) -> Kernel:
    """The kernel in GPyTorch; its hyperparameters are put into ``found``."""

    def keep(module: Kernel, name: str, own: str, power: float = 1.0) -> None:
        constraint = getattr(module, f"raw_{own}_constraint")
        raw = getattr(module, f"raw_{own}")
        each = Hyperparameter(raw, constraint, power)
        value = np.atleast_1d(getattr(kernel, name)).astype(np.float64)
        each.assign(torch.from_numpy(np.log(value)))
        found[f"{prefix}{name}"] = each

    def inner(part: theirs.Kernel, name: str) -> Kernel:
        return _kernel(part, f"{prefix}{name}__", like, found)

    # The rule of the exact type: a subclass may be another function.
    rules = _translated.registry
    return rules.get(type(kernel), rules[object])(kernel, like, keep, inner)


@singledispatch
def _translated(
    kernel: theirs.Kernel,
    like: Tensor,
    keep: Callable[..., None],
    inner: Callable[[theirs.Kernel, str], Kernel],
) -> Kernel:
    known = [rule.__name__ for rule in _translated.registry if rule is not object]
    raise TypeError(
        f"kernel: scikit-learn's {type(kernel).__name__} has no form in GPyTorch here; "
        f"expected {', '.join(known)}, or WhiteKernel as a term of a sum"
    )


def _with_lengthscale(
    kernel: Any, like: Tensor, keep: Callable[..., None], base: Callable[..., Kernel]
) -> Kernel:
    dims = np.size(kernel.length_scale) if kernel.anisotropic else None
    if dims is not None and dims != len(like):
        raise ValueError(
            "kernel: Anisotropic kernel must have the same number of dimensions as "
            f"data ({dims}!={len(like)})"
        )
    made = base(ard_num_dims=dims, lengthscale_constraint=logarithmic()).to(like)
    keep(made, "length_scale", "lengthscale")
    return made


@_translated.register
def _(kernel: theirs.RBF, like: Tensor, keep: Any, inner: Any) -> Kernel:
    return _with_lengthscale(kernel, like, keep, RBFKernel)


@_translated.register
def _(kernel: theirs.Matern, like: Tensor, keep: Any, inner: Any) -> Kernel:
    if kernel.nu == math.inf:
        return _with_lengthscale(kernel, like, keep, RBFKernel)
    if kernel.nu not in (0.5, 1.5, 2.5):
        raise TypeError(
            f"kernel: expected Matern with nu .5, 1.5, 2.5 or inf, found nu {kernel.nu}"
        )
    return _with_lengthscale(
        kernel, like, keep, lambda **given: MaternKernel(nu=kernel.nu, **given)
    )


@_translated.register
def _(kernel: theirs.RationalQuadratic, like: Tensor, keep: Any, inner: Any) -> Kernel:
    made = RQKernel(
        lengthscale_constraint=logarithmic(), alpha_constraint=logarithmic()
    ).to(like)
    keep(made, "length_scale", "lengthscale")
    keep(made, "alpha", "alpha")
    return made


@_translated.register
def _(kernel: theirs.ExpSineSquared, like: Tensor, keep: Any, inner: Any) -> Kernel:
    if len(like) != 1:
        raise TypeError(
            "kernel: scikit-learn's ExpSineSquared of several columns is periodic in "
            "their distance, which GPyTorch has no kernel for; expected one column, or "
            "a gpytorch.kernels.PeriodicKernel"
        )
    made = PeriodicKernel(
        lengthscale_constraint=logarithmic(), period_length_constraint=logarithmic()
    ).to(like)
    # GPyTorch divides by the lengthscale, scikit-learn by its square.
    keep(made, "length_scale", "lengthscale", 2.0)
    keep(made, "periodicity", "period_length")
    return made


@_translated.register
def _(kernel: theirs.DotProduct, like: Tensor, keep: Any, inner: Any) -> Kernel:
    linear = LinearKernel(variance_constraint=logarithmic()).to(like)
    linear.variance = 1.0
    linear.requires_grad_(False)
    bias = ConstantKernel(constant_constraint=logarithmic()).to(like)
    keep(bias, "sigma_0", "constant", 2.0)
    return bias + linear


@_translated.register
def _(kernel: theirs.ConstantKernel, like: Tensor, keep: Any, inner: Any) -> Kernel:
    made = ConstantKernel(constant_constraint=logarithmic()).to(like)
    keep(made, "constant_value", "constant")
    return made


@_translated.register
def _(kernel: theirs.Sum, like: Tensor, keep: Any, inner: Any) -> Kernel:
    return AdditiveKernel(inner(kernel.k1, "k1"), inner(kernel.k2, "k2"))


@_translated.register
def _(kernel: theirs.Product, like: Tensor, keep: Any, inner: Any) -> Kernel:
    return ProductKernel(inner(kernel.k1, "k1"), inner(kernel.k2, "k2"))


def known_kernels() -> list[type[theirs.Kernel]]:
    """Classes of scikit-learn's kernels that can be translated, in whole or in part."""
    known = [cls for cls in _translated.registry if cls is not object]
    return [*known, theirs.WhiteKernel]
