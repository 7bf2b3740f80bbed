"""Posteriors over what a few examples tell about the weights, and their Gibbs risk.

A linear model f = offset + A v with v ~ N(0, I) has at n examples the outputs of
covariance K = A A^T = U diag(l) U^T. Of the weights, the examples see the coordinates
t = diag(l)^-1/2 U^T A v only: the prior says t ~ N(0, I), and f = offset + B t with
B = U diag(l)^1/2. A posterior that is the prior in all other directions and
t ~ N(c, diag(s^2)) in these has

    KL(Q || P) = 1/2 sum_i (s_i^2 - 1 - log s_i^2 + c_i^2),

exactly, and outputs that take one product to draw. Those of one output are Gaussian
with variances (B o B) s^2, so that a loss of each output by itself has a Gibbs risk in
closed form.

Of these posteriors those are tried that a likelihood to the power beta leaves: c the
most probable under it, s^2 = 1 / (1 + beta' h l) with its mean Hessian h. Where the
risk has a closed form, all of c and s are then moved down the bound itself.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class BoundedLoss:
    """A loss in [0, 1] of each example.

    Attributes:
        name: In words.
        of: From outputs (b, C, k) and targets to losses (b, k).
        expected: From means and variances of Gaussian outputs (b, C) and targets to
            expected losses (b,), where there is a closed form.
        chance: What a guess has; a bound that is not below says nothing.
    """

    name: str
    of: Callable[[Tensor, Tensor], Tensor]
    expected: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    chance: float = 1.0

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
                f"{float(found.min()):.4g} to {float(found.max()):.4g}"
            )
        return found


def error_rate(likelihood: Categorical, classes: int) -> BoundedLoss:
    """Whether the largest output is another class's; of several positions, how many."""

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        flat = likelihood.by_position(outputs)
        counted = likelihood.counted(y)
        labels = y.flatten() if counted is None else y.flatten() * counted.flatten()
        columns = labels.view(-1, 1, 1).expand(-1, 1, flat.shape[2])
        own = flat.gather(1, columns)[:, 0]
        # A tie is an error, and so is NaN.
        wrong = ~(own > flat.scatter(1, columns, -math.inf).amax(1))
        wrong = wrong.double().view(len(outputs), -1, flat.shape[2])
        if counted is None:
            return wrong.mean(1)
        shares = counted / counted.sum(1, keepdim=True).clamp_min(1)
        return (wrong * shares.unsqueeze(-1)).sum(1)

    return BoundedLoss("classification error", of, chance=1 - 1 / classes)


def label_error() -> BoundedLoss:
    """Which part of the labels has an output of the wrong sign."""

    def of(outputs: Tensor, y: Tensor) -> Tensor:
        signs = 2 * y.reshape(outputs.shape[:2]).to(outputs) - 1
        return (~(outputs * signs.unsqueeze(-1) > 0)).double().mean(1)

    def expected(mean: Tensor, variance: Tensor, y: Tensor) -> Tensor:
        signs = 2 * y.reshape(mean.shape).to(mean) - 1
        return torch.special.ndtr(-signs * mean / _deviation(variance)).mean(1)

    return BoundedLoss("label error", of, expected, chance=0.5)


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
        limit, deviation = tolerance.to(mean), _deviation(variance)
        sides = [(sign * error - limit) / deviation for sign in (1.0, -1.0)]
        return sum(map(torch.special.ndtr, sides), torch.zeros_like(mean)).mean(1)

    return BoundedLoss("error above the tolerance", of, expected)


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

    @functools.cached_property
    def squares(self) -> Float[Tensor, "nC r"]:
        """B o B."""
        return self.basis.square()

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

    def spread(self, z: Float[Tensor, "r k"] | None) -> Tensor:
        """What draws of N(0, I) add to the mean outputs (n, C, k), or the variances."""
        shape = self.prior.offset.shape
        if z is None:
            return (self.prior.squares @ self.variance).view(shape)
        moved = self.variance.sqrt().unsqueeze(1) * z
        return (self.prior.basis @ moved).view(*shape, -1)

    def risk(self, loss: BoundedLoss, y: Tensor, spread: Tensor) -> Tensor:
        """The Gibbs risk, in closed form or by draws (), with what ``spread`` gives."""
        prior = self.prior
        mean = prior.offset + (prior.basis @ self.mean).view_as(prior.offset)
        if spread.ndim == 3:
            return loss(mean.unsqueeze(-1) + spread, y).mean()
        assert loss.expected is not None
        return loss.expected(mean, spread, y).mean()

    def drawn_risks(
        self, loss: BoundedLoss, y: Tensor, draws: Iterator[Tensor]
    ) -> Float[Tensor, " k"]:
        """The mean loss of each draw (k,)."""
        at = self.prior.at(self.mean.unsqueeze(1))
        return torch.cat([loss(at + self.spread(z), y).mean(0) for z in draws])


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
class Found:
    """A posterior and what it is worth.

    Attributes:
        posterior: Q.
        risk: Its Gibbs risk on the examples, by the draws of the search if any.
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
        draws: Of N(0, I), where the risk has no closed form.
    """
    curvature = _mean_hessian(likelihood, prior.offset)
    means = [torch.zeros_like(prior.values)]
    for power in _POWERS:
        means.append(_most_probable(prior, likelihood, y, power, curvature, means[-1]))
    itself = best = Found(OutputPosterior(prior, means[0], means[0] + 1), 1.0, 1.0)
    for power in (0.0, *_POWERS):
        variance = 1 / (1 + power * curvature * prior.values)
        about = OutputPosterior(prior, means[0], variance)
        spread = about.spread(draws)
        for mean in means:
            posterior = replace(about, mean=mean)
            found = _valued(posterior, posterior.risk(loss, y, spread), delta)
            best = min(best, found, key=lambda each: each.bound)
            itself = itself if power or mean is not means[0] else found
    if draws is not None:
        return best
    # The bound has several minima: the least is mostly found from either side.
    ends = [_polished(found.posterior, loss, y, delta) for found in (best, itself)]
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


def _polished(
    start: OutputPosterior, loss: BoundedLoss, y: Tensor, delta: float
) -> Found:
    """Down the bound in all of c and log s^2."""
    r = len(start.mean)
    u = torch.cat([start.mean, start.variance.log()])

    def at(point: Tensor) -> tuple[OutputPosterior, Tensor]:
        found = replace(start, mean=point[:r], variance=point[r:].clamp(-40, 5).exp())
        return found, found.risk(loss, y, found.spread(None))

    def slope() -> Tensor:
        with torch.enable_grad():
            point = u.detach().requires_grad_()
            posterior, risk = at(point)
            found = _valued(posterior, risk, delta)
            by_risk, by_kl = _slopes(found.risk, found.bound)
            n = len(start.prior.offset)
            (by_risk * risk + by_kl / n * posterior.kl).backward()
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


def _deviation(variance: Tensor) -> Tensor:
    return variance.clamp_min(torch.finfo(variance.dtype).tiny).sqrt()
