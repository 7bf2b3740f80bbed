"""What can be maximised, and what its data and lengthscales are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from gpytorch.kernels import Kernel
from jaxtyping import Float
from torch import Tensor

from sgdgp.posterior import PathwisePosterior


@runtime_checkable
class Functions(Protocol):
    """A set of s functions of points in R^d, such as ``posterior.functions``.

    A method ``subset(index)``, the functions with these numbers, is used where there
    is one: functions are then maximised a few at a time, in less memory.
    """

    @property
    def num_functions(self) -> int:
        """Number of functions s."""

    def __call__(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "s n"]:
        """All functions at all points."""

    def each(self, x: Float[Tensor, "s q d"]) -> Float[Tensor, "s q"]:
        """Every function at points of its own, differentiable in x."""


@dataclass(frozen=True, eq=False)
class Source:
    """Functions and what is known of where they are large.

    Attributes:
        functions: What is maximised.
        x: Observed points (n, d), or None.
        y: Their values (n,), or None.
        lengthscale: How far functions stay alike along each input (d,), or None.
    """

    functions: Functions
    x: Tensor | None
    y: Tensor | None
    lengthscale: Tensor | None


def source_of(given: object) -> Source:
    """Functions with the data behind them, where there are some.

    Raises:
        TypeError: Neither a posterior of one output nor a set of functions.
        ValueError: The posterior has no samples.
    """
    if isinstance(given, PathwisePosterior):
        problem = given.problem
        with torch.no_grad():
            mean, _ = problem.prior.evaluate(problem.x)
        units = problem.prior.outcome_scale
        y = units.shift + units.scale * (problem.targets + mean)
        return Source(given.functions, problem.x, y, lengthscale_of(given))
    if isinstance(given, Functions):
        return Source(given, None, None, None)
    raise TypeError(
        "posterior: expected a posterior of one output, or functions with "
        f"num_functions and each, found {type(given).__name__}"
    )


def lengthscale_of(posterior: PathwisePosterior) -> Tensor | None:
    """The smallest lengthscale along every input, in the user's units (d,).

    None where the kernel has none, or sees something else than the inputs, each
    moved and scaled on its own.
    """
    x, inputs = posterior.problem.x, posterior.problem.operator.x
    if inputs.shape[1] != x.shape[1]:
        return None
    lengths = kernel_lengthscale(posterior.problem.prior.kernel, inputs)
    scale = input_scale(x, inputs)
    return None if lengths is None or scale is None else lengths / scale


def kernel_lengthscale(kernel: Kernel, inputs: Tensor) -> Tensor | None:
    """The smallest lengthscale of all parts of a kernel along every input (d,)."""
    smallest = inputs.new_full(inputs.shape[1:], torch.inf)
    for part in kernel.modules():
        if not isinstance(part, Kernel) or not part.has_lengthscale:
            continue
        length = part.lengthscale.detach().reshape(-1).to(inputs)
        where = part.active_dims
        if where is None:
            where = torch.arange(len(smallest), device=inputs.device)
        if len(length) not in (1, len(where)):
            return None
        smallest[where] = torch.minimum(smallest[where], length.expand(len(where)))
    if not torch.isfinite(smallest).any():
        return None
    return smallest


def input_scale(x: Tensor, inputs: Tensor) -> Tensor | None:
    """The factors s with inputs = s x + constant (d,), None if there are none."""
    spread, other = x - x.mean(0), inputs - inputs.mean(0)
    norms = spread.square().sum(0)
    scale = (spread * other).sum(0) / norms.clamp_min(torch.finfo(x.dtype).tiny)
    scale = torch.where(norms > 0, scale, torch.ones_like(scale)).abs()
    error = (other.abs() - scale * spread.abs()).abs().amax()
    if error > 1e-3 * other.abs().amax() or bool((scale <= 0).any()):
        return None
    return scale
