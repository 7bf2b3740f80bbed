"""PAC-Bayes bounds on the risk of a random predictor, and what they are made of.

Let Q be a posterior over predictors, P a prior that has not seen the n examples, and r
the mean over Q of the mean loss in [0, 1] on them (the Gibbs risk; that of an averaged
predictor is another one). With probability 1 - delta over the examples, for all Q at
once, the expected loss R of Q is below each of

- inverse kl (Seeger 2002, Maurer 2004): the largest p with
  kl(r || p) <= (KL(Q || P) + log(2 sqrt(n) / delta)) / n;
- McAllester (1999, with Maurer's constant): r + sqrt(half of that right-hand side),
  which is never below the first (Pinsker);
- Catoni (2007): (1 - exp(-c r - (KL + log(1 / delta)) / n)) / (1 - exp(-c)) for one c
  chosen beforehand. The smallest over several c holds with delta shared out to them.

A choice among m priors by the same examples has delta / m in the place of delta.

Where r itself is known by draws of Q only, a bound on it takes its place (Langford and
Caruana 2002): kl(mean || r) <= log(1 / delta') / k for k draws, or, better where draws
hardly differ, the empirical Bernstein inequality (Maurer and Pontil 2009).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.priors import Estimate, WeightPrior

CATONI = tuple(2.0**i for i in range(-4, 5))
"""Values of c that are tried: a bound's best is flat in it, so powers of two do."""

_MOST_STEPS = 100
"""Of Newton's method for an inverse kl; some five are needed."""

_ROUNDING = 1e-14
"""Relative, by which an inverse kl is put up: more than its last steps may be off."""


def gaussian_kl(
    q: WeightPrior, p: WeightPrior, shift: Float[Tensor, "D 1"] | None = None
) -> Estimate:
    """KL(N(m, Q^-1) || N(m - shift, P^-1)) in nats.

    (tr(Q^-1 P) - D + log det Q - log det P + shift^T P shift) / 2.

    Args:
        q: Precision Q of the first.
        p: Precision P of the second, in the same blocks.
        shift: Difference of the means. Default: none.

    Returns:
        The value; its standard error is zero unless a block is a long sum.

    Raises:
        ValueError: They are over different weights.
    """
    known = q.trace_solve(p) + q.logdet() + p.logdet().times(-1.0)
    square = 0.0
    if shift is not None:
        square = float((shift * p.matmul(shift)).double().sum())
    found = (known + Estimate(square - q.num_weights)).times(0.5)
    # Rounding may leave less than nothing of the divergence of equal ones.
    return Estimate(max(found.value, 0.0), found.standard_error)


def binary_kl(r: float, p: float) -> float:
    """kl(r || p) = r log(r / p) + (1 - r) log((1 - r) / (1 - p)) of two coins."""
    found = 0.0
    for a, b in ((r, p), (1.0 - r, 1.0 - p)):
        if a > 0:
            found += math.inf if b <= 0 else a * math.log(a / b)
    return max(found, 0.0)


def inverse_kl(r: float, budget: float) -> float:
    """The largest p with kl(r || p) <= budget, rounded upwards.

    Raises:
        ValueError: r is outside [0, 1] or the budget is negative.
    """
    _check(r, budget)
    if r == 1:
        return 1.0
    # Newton's method from above the root of a convex function stays there. Above are
    # Pinsker's p, and that of kl(r || p) without r log(1 / p).
    entropy = -r * math.log(r) if r > 0 else 0.0
    entropy -= (1 - r) * math.log1p(-r)
    p = min(r + math.sqrt(budget / 2), -math.expm1(-(budget + entropy) / (1 - r)))
    for _ in range(_MOST_STEPS):
        if not r < p < 1:
            break
        step = (binary_kl(r, p) - budget) * p * (1 - p) / (p - r)
        if not step > 0 or p - step == p:
            break
        p -= step
    return min(max(p, r) * (1 + _ROUNDING), 1.0)


def inverse_kl_bound(risk: float, kl: float, n: int, delta: float) -> float:
    """Of the risk of Q, by the inverse of the binary kl.

    Args:
        risk: Gibbs risk on the examples, or a bound on it that holds.
        kl: KL(Q || P), or a bound on it.
        n: Examples.
        delta: Probability with which the bound may fail.

    Raises:
        ValueError: A number is outside of what it can be.
    """
    return inverse_kl(risk, _budget(risk, kl, n, delta))


def mcallester_bound(risk: float, kl: float, n: int, delta: float) -> float:
    """Of the risk of Q, by McAllester; at most 1. Arguments as ``inverse_kl_bound``."""
    return min(1.0, risk + math.sqrt(_budget(risk, kl, n, delta) / 2))


def catoni_bound(
    risk: float, kl: float, n: int, delta: float, c: Sequence[float] = CATONI
) -> float:
    """Of the risk of Q, by Catoni: the smallest over c, each with its share of delta.

    Args:
        risk: Gibbs risk on the examples, or a bound on it that holds.
        kl: KL(Q || P), or a bound on it.
        n: Examples.
        delta: Probability with which the bound may fail.
        c: Chosen without the examples.

    Raises:
        ValueError: A number is outside of what it can be.
    """
    _budget(risk, kl, n, delta)
    if not c or min(c) <= 0:
        raise ValueError(f"c: expected positive numbers, found {list(c)}")
    budget = (kl + math.log(len(c) / delta)) / n
    found = (math.expm1(-k * risk - budget) / math.expm1(-k) for k in c)
    return min(1.0, *found)


def mean_bound(values: Float[Tensor, " k"], delta: float) -> float:
    """Of the expectation of a number in [0, 1], by independent draws of it.

    The smaller of kl's and Bernstein's, each with half of delta.

    Raises:
        ValueError: Fewer than two draws, or some outside [0, 1].
    """
    k, values = len(values), values.double()
    if k < 2:
        raise ValueError(f"values: expected at least two draws, found {k}")
    _check(float(values.max()), float(values.min()))
    mean, log = float(values.mean()), math.log(4 / delta)
    spread = math.sqrt(2 * float(values.var()) * log / k) + 7 * log / (3 * (k - 1))
    return min(inverse_kl(mean, math.log(2 / delta) / k), mean + spread)


def _budget(risk: float, kl: float, n: int, delta: float) -> float:
    """(KL + log(2 sqrt(n) / delta)) / n."""
    _check(risk, kl)
    if n < 1:
        raise ValueError(f"n: expected at least one example, found {n}")
    if not 0 < delta < 1:
        raise ValueError(f"delta: expected a probability in (0, 1), found {delta}")
    return (kl + math.log(2 * math.sqrt(n) / delta)) / n


def _check(risk: float, kl: float) -> None:
    if not 0 <= risk <= 1:
        raise ValueError(f"risk: expected a mean of losses in [0, 1], found {risk}")
    if not kl >= 0:
        raise ValueError(f"kl: expected no negative number, found {kl}")
