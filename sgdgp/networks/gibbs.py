"""Posteriors over what a few examples tell about the weights, and their Gibbs risk.

A linear model f = offset + A v with v ~ N(0, I) has at n examples the outputs of
covariance K = A A^T = U diag(l) U^T. Of the weights, the examples see the coordinates
t = diag(l)^-1/2 U^T A v only: the prior says t ~ N(0, I), and f = offset + B t with
B = U diag(l)^1/2. A posterior that is the prior in all other directions and
t ~ N(c, diag(s^2)) in these has

    KL(Q || P) = 1/2 sum_i (s_i^2 - 1 - log s_i^2 + c_i^2),

exactly, and outputs that take one product to draw. Single outputs, and differences of
two, are Gaussian with variances that take another: the errors of regressions, of labels
and of two classes have a Gibbs risk in closed form. With more classes it has one if the
margins from the others were independent, which is near enough to look for a posterior.

Of these posteriors those are tried that a likelihood to the power beta leaves: c the
most probable under it, s^2 = 1 / (1 + beta' h l) with its mean Hessian h. Then all of c
and s are moved down the bound itself. Nothing of this is more than a choice of Q.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.seeds import standard_normal
from sgdgp.networks.bounds import inverse_kl_bound
from sgdgp.networks.likelihoods import Categorical, Likelihood

_POWERS = tuple(4.0**i for i in range(-2, 3))
"""beta of the means and beta' of the variances, each with each."""

_STEPS = 60
"""Of L-BFGS, for a mean and for a bound."""

_DRAWN = 256
"""Draws of all outputs at a time."""

_LEAST_RISK = 1e-9
"""Where the slope of a bound in the risk is taken at least: it is infinite at zero."""

_FAR = 1e5
"""Deviations, beyond which nothing is."""


@dataclass(frozen=True)
class BoundedLoss:
    """A loss in [0, 1] of each example.

    Attributes:
        name: In words.
        of: From outputs (b, C, k) and targets to losses (b, k).
        expected: From means and variances of Gaussian margins (b, M) and targets to
            expected losses (b,), if there is such a formula.
        margins: From outputs and targets to what the loss depends on, linear in the
            outputs (b, M, k). Default: the outputs.
        is_exact: Whether the formula is exact.
        chance: What a guess has; a bound that is not below says nothing.
        made_by: A function of this module and its arguments that give this loss, which
            is what a pickle knows of it.
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]
    expected: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    margins: Callable[[Tensor, Tensor], Tensor] | None = None
    is_exact: bool = False
    chance: float = 1.0
    made_by: tuple[Callable[..., BoundedLoss], tuple[Any, ...]] | None = None

    def __reduce__(self) -> tuple[Callable[..., BoundedLoss], tuple[Any, ...]]:
        return self.made_by or (BoundedLoss, (self.name, self.of))

    def __call__(self, outputs: Float[Tensor, "b C k"], y: Tensor) -> Tensor:
        """Losses (b, k).

        Raises:
            ValueError: They are of another shape, or some are outside [0, 1].
        """
        found = self.of(outputs, y)
        shape = (len(outputs), outputs.shape[2])
        if not isinstance(found, Tensor) or found.shape != shape:
            what = tuple(getattr(found, "shape", ())) or type(found).__name__
            raise ValueError(f"loss: expected losses of shape {shape}, found {what}")
        found = found.double()
        if not bool(((found >= 0) & (found <= 1)).all()):
            raise ValueError(
                "loss: expected losses in [0, 1], which the bounds are of, found "
                f"{float(found.min()):.9g} to {float(found.max()):.9g}"
            )
        return found


def error_rate(likelihood: Categorical, classes: int) -> BoundedLoss:
    """Whether the largest output is another class's; of several positions, how many."""

    def margins(outputs: Tensor, y: Tensor) -> Tensor:
        flat = likelihood.by_position(outputs)
        counted = likelihood.counted(y)
        labels = y.flatten() if counted is None else y.flatten() * counted.flatten()
        others = torch.arange(1, classes, device=labels.device)
        others = (labels.unsqueeze(1) + others) % classes
        rows = torch.arange(len(flat), device=labels.device)
        found = flat[rows, labels].unsqueeze(1) - flat[rows.unsqueeze(1), others]
        return found.view(len(outputs), -1, outputs.shape[2])

    def mean(wrong: Tensor, y: Tensor) -> Tensor:
        """Over the positions (b, P, ...) that have a label."""
        counted = likelihood.counted(y)
        if counted is None:
            return wrong.mean(1)
        shares = counted / counted.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("bp...,bp->b...", wrong, shares.to(wrong))

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        least = margins(outputs, y).unflatten(1, (-1, classes - 1)).amin(2)
        # A tie is an error, and so is NaN.
        return mean((~(least > 0)).double(), y)

    def expected(m: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        # Far below, PyTorch's slope of log_ndtr is the exponential of its rounding.
        each = torch.special.log_ndtr(_standardised(m, variance).clamp_min(-_FAR))
        return mean(-torch.expm1(each.unflatten(1, (-1, classes - 1)).sum(2)), y)

    return BoundedLoss(
        "classification error",
        of,
        expected,
        margins,
        is_exact=classes == 2,
        chance=1 - 1 / classes,
        made_by=(error_rate, (likelihood, classes)),
    )


def label_error() -> BoundedLoss:
    """Which part of the labels has an output of the wrong sign."""

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        signs = 2 * y.reshape(outputs.shape[:2]).to(outputs) - 1
        return (~(outputs * signs.unsqueeze(-1) > 0)).double().mean(1)

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        signs = 2 * y.reshape(mean.shape).to(mean) - 1
        return torch.special.ndtr(-_standardised(signs * mean, variance)).mean(1)

    return BoundedLoss(
        "label error",
        of,
        expected,
        is_exact=True,
        chance=0.5,
        made_by=(label_error, ()),
    )


def out_of_tolerance(tolerance: Tensor) -> BoundedLoss:
    """Which part of the outputs is off by more than the tolerance, () or (C,)."""

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        errors = (
            outputs - y.reshape(outputs.shape[:2]).to(outputs).unsqueeze(-1)
        ).abs()
        limit = tolerance.to(outputs).unsqueeze(-1)
        return (~(errors <= limit)).double().mean(1)

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        error = mean - y.reshape(mean.shape).to(mean)
        limit = tolerance.to(mean)
        sides = [_standardised(sign * error - limit, variance) for sign in (1.0, -1.0)]
        return sum(map(torch.special.ndtr, sides), torch.zeros_like(mean)).mean(1)

    return BoundedLoss(
        "error above the tolerance",
        of,
        expected,
        is_exact=True,
        made_by=(out_of_tolerance, (tolerance,)),
    )


@dataclass(frozen=True)
class OutputPrior:
    """N(offset, U diag(l) U^T) of the outputs of n examples, in float64.

    Attributes:
        offset: Outputs at v = 0 (n, C).
        values: l (r,), not negative.
        vectors: U (n C, r).
    """

    offset: Float[Tensor, "n C"]
    values: Float[Tensor, " r"]
    vectors: Float[Tensor, "nC r"]

    @classmethod
    def of(
        cls, offset: Float[Tensor, "n C"], gram: Float[Tensor, "nC nC"]
    ) -> OutputPrior:
        """By the eigenvectors of K."""
        values, vectors = torch.linalg.eigh(gram)
        return cls(offset.double(), values.clamp_min(0.0), vectors)

    def over(self, precision: float) -> OutputPrior:
        """With K over a number."""
        return replace(self, values=self.values / precision)

    @functools.cached_property
    def basis(self) -> Float[Tensor, "nC r"]:
        """B."""
        return self.vectors * self.values.sqrt()

    def at(self, t: Float[Tensor, "r k"]) -> Float[Tensor, "n C k"]:
        """Outputs offset + B t."""
        added = (self.basis @ t).view(*self.offset.shape, -1)
        return added.add_(self.offset.unsqueeze(-1))


@dataclass(frozen=True)
class OutputPosterior:
    """t ~ N(c, diag(s^2)).

    Attributes:
        prior: What it is about.
        mean: c (r,).
        variance: s^2 (r,), positive.
    """

    prior: OutputPrior
    mean: Float[Tensor, " r"]
    variance: Float[Tensor, " r"]

    @property
    def kl(self) -> Tensor:
        """KL(Q || P) in nats ()."""
        v = self.variance
        return 0.5 * (v - 1 - v.log() + self.mean.square()).sum().clamp_min(0.0)

    def drawn_risks(
        self, loss: BoundedLoss, y: Tensor, draws: Iterator[Tensor]
    ) -> Float[Tensor, " k"]:
        """The mean loss of each draw (k,)."""
        mean, deviation = self.mean.unsqueeze(1), self.variance.sqrt().unsqueeze(1)
        outputs = (self.prior.at(mean + deviation * z) for z in draws)
        return torch.cat([loss(each, y).mean(0) for each in outputs])


def normal_draws(
    prior: OutputPrior, count: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "r k"]]:
    """Draws of N(0, I) for ``outputs``, some at a time."""
    like, left = prior.values, count
    while left > 0:
        some = min(left, _DRAWN)
        yield standard_normal(some, len(like), like=like, generator=generator).mT
        left -= some


@dataclass(frozen=True)
class Risk:
    """The Gibbs risk of posteriors about one prior, as a function of c and s^2.

    Attributes:
        loss: With a formula for it; or else by draws.
        y: Targets.
        offset: Margins at t = 0 (n, M).
        basis: What t adds to them (n M, r).
        squares: What s^2 adds to their variances (n M, r).
    """

    loss: BoundedLoss
    y: Tensor
    offset: Float[Tensor, "n M"]
    basis: Float[Tensor, "nM r"]
    squares: Float[Tensor, "nM r"]

    @classmethod
    def of(cls, loss: BoundedLoss, y: Tensor, prior: OutputPrior) -> Risk:
        """For the posteriors about a prior."""
        offset, basis = prior.offset.unsqueeze(-1), prior.basis
        if loss.margins is not None:
            basis = basis.view(*prior.offset.shape, -1)
            offset, basis = (loss.margins(part, y) for part in (offset, basis))
            basis = basis.flatten(0, 1)
        return cls(loss, y, offset[..., 0], basis, basis.square())

    def at(self, mean: Tensor, variance: Tensor) -> Tensor:
        """The risk (), by means of the margins and their variances (n, M)."""
        assert self.loss.expected is not None
        return self.loss.expected(mean, variance, self.y).mean()

    def means(self, c: Float[Tensor, " r"]) -> Float[Tensor, "n M"]:
        """Means of the margins."""
        return self.offset + (self.basis @ c).view_as(self.offset)

    def variances(self, s2: Float[Tensor, " r"]) -> Float[Tensor, "n M"]:
        """Variances of the margins."""
        return (self.squares @ s2).view_as(self.offset)


@dataclass(frozen=True)
class Found:
    """A posterior and what it is worth.

    Attributes:
        posterior: Q.
        risk: Its Gibbs risk on the examples, by the formula or the draws of the search.
        bound: By inverse kl.
    """

    posterior: OutputPosterior
    risk: float
    bound: float


@torch.no_grad()
def smallest_bound(
    prior: OutputPrior,
    likelihood: Likelihood,
    y: Tensor,
    loss: BoundedLoss,
    delta: float,
    draws: Float[Tensor, "r k"] | None,
) -> Found:
    """The posterior with the smallest bound of those that are tried.

    Args:
        prior: Of the outputs.
        likelihood: What makes posteriors to try; any of them has a bound.
        y: Targets of the examples.
        loss: Of the risk.
        delta: Probability with which the bound may fail.
        draws: Of N(0, I), where there is no formula for the risk.
    """
    curvature = _mean_hessian(likelihood, prior.offset)
    means = [torch.zeros_like(prior.values)]
    for power in _POWERS:
        means.append(_most_probable(prior, likelihood, y, power, curvature, means[-1]))
    tried = [
        OutputPosterior(prior, mean, 1 / (1 + power * curvature * prior.values))
        for power in (0.0, *_POWERS)
        for mean in means
    ]
    if draws is not None:
        risks = [q.drawn_risks(loss, y, iter([draws])).mean() for q in tried]
        found = [_valued(q, r, delta) for q, r in zip(tried, risks, strict=True)]
        return min(found, key=lambda each: each.bound)
    risk = Risk.of(loss, y, prior)
    centres = [risk.means(mean) for mean in means]
    spreads = [risk.variances(q.variance) for q in tried[:: len(means)]]
    risks = [risk.at(mean, variance) for variance in spreads for mean in centres]
    found = [_valued(q, r, delta) for q, r in zip(tried, risks, strict=True)]
    best = min(found, key=lambda each: each.bound)
    # The bound has several minima: the least is mostly found from either side.
    ends = [_polished(start.posterior, risk, delta) for start in (best, found[0])]
    return min(best, *ends, key=lambda each: each.bound)


def _valued(posterior: OutputPosterior, risk: Tensor, delta: float) -> Found:
    value = min(max(float(risk.detach()), 0.0), 1.0)
    n, kl = len(posterior.prior.offset), float(posterior.kl.detach())
    return Found(posterior, value, inverse_kl_bound(value, kl, n, delta))


def _mean_hessian(likelihood: Likelihood, outputs: Float[Tensor, "n C"]) -> float:
    eye = torch.eye(outputs.shape[1], dtype=outputs.dtype, device=outputs.device)
    hessian = likelihood.hessian(outputs, eye.expand(len(outputs), -1, -1))
    return max(float(hessian.diagonal(dim1=1, dim2=2).mean()), 1e-6)


def _most_probable(
    prior: OutputPrior,
    likelihood: Likelihood,
    y: Tensor,
    power: float,
    curvature: float,
    start: Float[Tensor, " r"],
) -> Float[Tensor, " r"]:
    """The c that minimises power * loss + |c|^2 / 2, or comes near it."""
    # In these coordinates the Hessian is the identity if that of the loss is constant.
    scale = (1 + power * curvature * prior.values).rsqrt()
    u = start / scale

    def slope() -> Tensor:
        c = scale * u
        outputs = prior.at(c.unsqueeze(1))
        gradient = likelihood.gradient(outputs[..., 0], y).flatten()
        u.grad = scale * (power * (prior.basis.mT @ gradient) + c)
        value = -likelihood.log_prob(outputs, y).sum()
        return power * value + 0.5 * c.square().sum()

    _descend(u, slope)
    return scale * u


def _polished(start: OutputPosterior, risk: Risk, delta: float) -> Found:
    """Down the bound in all of c and log s^2."""
    r = len(start.mean)
    u = torch.cat([start.mean, start.variance.log()])

    def at(point: Tensor) -> tuple[OutputPosterior, Tensor]:
        found = replace(start, mean=point[:r], variance=point[r:].clamp(-40, 5).exp())
        return found, risk.at(risk.means(found.mean), risk.variances(found.variance))

    def slope() -> Tensor:
        with torch.enable_grad():
            point = u.detach().requires_grad_()
            posterior, value = at(point)
            found = _valued(posterior, value, delta)
            by_risk, by_kl = _slopes(found.risk, found.bound)
            n = len(start.prior.offset)
            (by_risk * value + by_kl / n * posterior.kl).backward()
        u.grad = point.grad
        return u.new_tensor(found.bound)

    _descend(u, slope)
    return _valued(*at(u), delta)


def _slopes(r: float, p: float) -> tuple[float, float]:
    """Of the p with kl(r || p) = budget, in r and in the budget."""
    r = min(max(r, _LEAST_RISK), 1 - 2 * _LEAST_RISK)
    p = min(max(p, r + _LEAST_RISK), 1 - _LEAST_RISK)
    by_p = (p - r) / (p * (1 - p))
    by_r = math.log(r / p) - math.log((1 - r) / (1 - p))
    return -by_r / by_p, 1 / by_p


def _descend(u: Tensor, slope: Callable[[], Tensor]) -> None:
    """Move u in place down a function that sets ``u.grad`` and returns its value."""
    descent = torch.optim.LBFGS(
        [u], max_iter=_STEPS, tolerance_change=1e-6, line_search_fn="strong_wolfe"
    )
    descent.step(slope)


def _standardised(margin: Tensor, variance: Tensor) -> Tensor:
    """Margins over their deviations; without any, what is not above zero is below."""
    certain = torch.where(margin > 0, _FAR, -_FAR)
    # Not so small that slopes overflow.
    deviation = variance.clamp_min(1e-60).sqrt()
    return torch.where(variance > 0, margin / deviation, certain.to(margin))
