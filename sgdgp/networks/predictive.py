"""From outputs and their fluctuations to predictions: links, joint scores, doubt.

A linearised network predicts outputs f(x) + g(x) with f (b, C) what the network says
and fluctuations g (b, C, k) = J(x) R v_k, one column per posterior sample. They have
mean zero, so their variance is the mean of their squares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Link: TypeAlias = Literal["probit", "monte_carlo"]
"""From logits and their samples to class probabilities."""

DYADIC_LABELS = 10
"""Labels that a pair of anchors gets in the dyadic joint log-likelihood: the choice of
the paper that proposes it, and numbers of other choices do not compare."""


def check_link(link: str) -> None:
    """Refuse what is no link.

    Raises:
        ValueError: Names both.
    """
    if link not in get_args(Link):
        raise ValueError(f'link: expected "probit" or "monte_carlo", found {link!r}')


@dataclass(frozen=True)
class GaussianPrediction:
    """Predicted outputs of a regression network.

    Attributes:
        mean: What the network or its linear model says (b, C).
        variance: Variance of the function, without noise (b, C).
        noise: Noise variance of the targets, one for all outputs or one each.
    """

    mean: Float[Tensor, "b C"]
    variance: Float[Tensor, "b C"]
    noise: float | tuple[float, ...] = 0.0

    @property
    def target_variance(self) -> Float[Tensor, "b C"]:
        """Variance of an observed target, noise included (b, C)."""
        return self.variance + self.variance.new_tensor(self.noise)

    @property
    def deviation(self) -> Float[Tensor, "b C"]:
        """Standard deviation of an observed target, noise included (b, C)."""
        return self.target_variance.sqrt()

    def log_density(self, y: Tensor) -> Float[Tensor, " b"]:
        """Log density N(y | mean, target_variance), summed over the outputs (b,)."""
        variance = self.target_variance
        error = y.reshape(self.mean.shape).to(self.mean) - self.mean
        terms = error.square() / variance + (2 * math.pi * variance).log()
        return -0.5 * terms.sum(1)


def variance_of(fluctuations: Float[Tensor, "b C k"]) -> Float[Tensor, "b C"]:
    """Variance of each output, the mean square over samples (b, C)."""
    norms = torch.linalg.vector_norm(fluctuations, dim=-1)
    return norms.square() / fluctuations.shape[-1]


def log_probit(
    f: Float[Tensor, "b C"], variance: Float[Tensor, "b C"]
) -> Float[Tensor, "b C"]:
    """Log of ``probit``, finite however unlikely a class is."""
    return (f * (1 + math.pi / 8 * variance).rsqrt()).log_softmax(1)


def probit(
    f: Float[Tensor, "b C"], variance: Float[Tensor, "b C"]
) -> Float[Tensor, "b C"]:
    """Class probabilities softmax(f / sqrt(1 + pi v / 8)).

    The approximation of the logistic-normal integral by a probit (MacKay, Neural
    Computation 4, 1992), class by class. It needs variances only and is smooth in
    them, so that few samples do.
    """
    return log_probit(f, variance).exp()


def log_monte_carlo(
    f: Float[Tensor, "b C"], fluctuations: Float[Tensor, "b C k"]
) -> Float[Tensor, "b C"]:
    """Log of ``monte_carlo``, finite however unlikely a class is."""
    return _log_mean((f.unsqueeze(-1) + fluctuations).log_softmax(1))


def monte_carlo(
    f: Float[Tensor, "b C"], fluctuations: Float[Tensor, "b C k"]
) -> Float[Tensor, "b C"]:
    """Class probabilities mean_k softmax(f + g_k), unbiased in the number k."""
    return log_monte_carlo(f, fluctuations).exp()


def label_logits(
    f: Float[Tensor, "b C"], fluctuations: Float[Tensor, "b C k"]
) -> tuple[Float[Tensor, "bC 2"], Float[Tensor, "bC 2 k"]]:
    """Logits (0, f) of label 0 and 1, each output an example of its own."""
    f, fluctuations = f.flatten(), fluctuations.flatten(0, 1)
    zeros = torch.zeros_like
    return (
        torch.stack([zeros(f), f], 1),
        torch.stack([zeros(fluctuations), fluctuations], 1),
    )


def joint_log_prob(log_probs: Float[Tensor, "b k"]) -> float:
    """Log probability of all targets of a batch together, in nats.

    log p(y_1, ..., y_b) = log mean_k prod_b p_k(y_b): one sample explains the whole
    batch, so that outputs which belong together have to vary together. The estimate is
    low on average, the more so the larger the batch and the fewer the samples.

    Args:
        log_probs: log p_k(y_b) of each target under each sample (b, k), as from
            ``Likelihood.log_prob``; k = 1 for a network alone.

    Raises:
        ValueError: Nothing to score, or log probabilities that are NaN.
    """
    _check_log_probs(log_probs)
    return float(_log_mean(log_probs.double().sum(0, keepdim=True))[0])


def dyadic_joint_log_prob(
    log_probs: Float[Tensor, "n k"],
    generator: torch.Generator,
    *,
    repeats: int = 10,
) -> float:
    """Joint log probability of pairs of anchors, per label (dyadic sampling).

    Two examples get ten labels together, each a copy of its example's target: the
    first gets m of them, uniform in 1, ..., 9, the second 10 - m. The joint log
    probability log mean_k p_k(y_1)^m p_k(y_2)^(10 - m), divided by ten, rewards
    predictions that are sure which of their doubts belong together (Osband et al.,
    Evaluating high-order predictive distributions, 2022). With one sample its
    expectation is the mean log-likelihood: what exceeds that is what samples know.

    Args:
        log_probs: log p_k(y_n) of each target under each sample (n, k).
        generator: Pairs the examples and draws m.
        repeats: How many times all examples are paired anew. Default: 10.

    Returns:
        The mean over pairs, in nats per label; higher is better.

    Raises:
        ValueError: Fewer than two examples, or log probabilities that are NaN.
    """
    _check_log_probs(log_probs)
    n = len(log_probs)
    if n < 2:
        raise ValueError(f"log_probs: expected at least two examples, found {n}")
    device = generator.device
    total = 0.0
    for _ in range(repeats):
        order = torch.randperm(n, generator=generator, device=device)
        first, second = order[: n // 2 * 2].to(log_probs.device).view(2, -1)
        share = torch.randint(
            1, DYADIC_LABELS, (n // 2, 1), generator=generator, device=device
        ).to(log_probs.device)
        together = (
            share * log_probs[first].double()
            + (DYADIC_LABELS - share) * log_probs[second].double()
        )
        total += float(_log_mean(together).mean())
    return total / (repeats * DYADIC_LABELS)


def predictive_entropy(probabilities: Float[Tensor, "b C"]) -> Float[Tensor, " b"]:
    """Entropy of the predicted classes in nats (b,): doubt of whatever origin.

    The usual score of out-of-distribution inputs, high where the posterior has made
    the prediction flat.
    """
    return -torch.xlogy(probabilities, probabilities).sum(1)


def mutual_information(
    f: Float[Tensor, "b C"], fluctuations: Float[Tensor, "b C k"]
) -> Float[Tensor, " b"]:
    """What the label would tell about the weights, in nats (b,).

    The entropy of the mean prediction minus the mean entropy of the samples'
    predictions: doubt that more data would remove, none of it from noisy labels.
    """
    each = (f.unsqueeze(-1) + fluctuations).log_softmax(1)
    within = -(each.exp() * each).sum(1).mean(-1)
    mean = _log_mean(each)
    return (-(mean.exp() * mean).sum(1) - within).clamp_min(0.0)


def logit_variance(fluctuations: Float[Tensor, "b C k"]) -> Float[Tensor, " b"]:
    """Mean variance of the outputs (b,), whatever they have in common taken off.

    A shift of all logits together changes no probability. With one output there is
    nothing to take off.
    """
    variance = variance_of(fluctuations).mean(1)
    if fluctuations.shape[1] == 1:
        return variance
    common = fluctuations.mean(1, keepdim=True)
    return (variance - variance_of(common).squeeze(1)).clamp_min(0.0)


def _log_mean(values: Tensor) -> Tensor:
    """Log of the mean of exponentials over the last axis."""
    return values.logsumexp(-1) - math.log(values.shape[-1])


def _check_log_probs(log_probs: Tensor) -> None:
    if log_probs.numel() == 0:
        raise ValueError(
            f"log_probs: expected targets and samples, found shape "
            f"{tuple(log_probs.shape)}"
        )
    if bool(log_probs.isnan().any()):
        raise ValueError("log_probs: expected log probabilities, found NaN")
