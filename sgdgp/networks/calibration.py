"""One variance scale for a posterior, fitted on held-out examples; and a verdict.

The evidence sets prior precision and noise of a linearised network from its training
data, which often leaves too much or too little variance around a well-trained network.
Scaling all variances by one number that minimises the negative log likelihood of
held-out examples repairs most of that; scale 0 is the network itself. The network alone
gets a number fitted on the same examples, and the comparison says which of the two to
use. Everything here works on cached outputs and fluctuations: no pass through the
network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_finite
from sgdgp.core.slices import slices
from sgdgp.core.summary import Summarised, html_table
from sgdgp.metrics import interval_coverage, reliability_of, rmse
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sgdgp.networks.predictive import (
    GaussianPrediction,
    Link,
    check_link,
    dyadic_joint_log_prob,
    label_logits,
    log_monte_carlo,
    log_probit,
    variance_of,
)

NETWORK = "network"
EVIDENCE = "posterior (evidence)"
CALIBRATED = "posterior (calibrated)"
POSTERIOR = "posterior"

SIGNIFICANT = 2.0
"""Standard errors that a difference has to have before a recommendation rests on it."""


@dataclass(frozen=True)
class Entry:
    """One way to predict, scored on the held-out examples.

    Attributes:
        nll: Negative log likelihood of each example (n,).
        scores: Mean scores by name; a joint log-likelihood as "joint".
    """

    nll: Float[Tensor, " n"]
    scores: Mapping[str, float]


@dataclass(frozen=True, repr=False)
class Comparison(Summarised):
    """Scores of a network and its posterior on held-out examples; ``str`` is a table.

    Attributes:
        scores: For each way to predict, its scores by name.
        gains: For each, its negative log likelihood minus the network's, and the
            standard error of that difference over the paired examples.
        scale: Variance scale of the calibrated posterior.
        fitted: What was fitted for the network alone: temperature or noise variance.
        num_examples: Held-out examples.
        recommendation: "posterior" (calibrated), or the row of the network to prefer.
        reason: Why, in a sentence.
        warnings: What else the user should know, a sentence each.
    """

    scores: dict[str, dict[str, float]]
    gains: dict[str, tuple[float, float]]
    scale: float
    fitted: float | tuple[float, ...]
    num_examples: int
    recommendation: str
    reason: str
    warnings: tuple[str, ...]

    def _facts(self) -> dict[str, Any]:
        return {
            "num_examples": self.num_examples,
            "scale": self.scale,
            "warnings": self.warnings,
            "recommendation": self.recommendation,
        }

    def _rows(self) -> list[list[str]]:
        """The table: a head, then a row for each way to predict."""
        columns = list(next(iter(self.scores.values())))
        rows = [["", *columns, "nll - network's"]]
        for name, scores in self.scores.items():
            gain, error = self.gains[name]
            values = [f"{scores[column]:.4f}" for column in columns]
            rows.append([name, *values, f"{gain:+.4f} ± {error:.4f}"])
        return rows

    def _sentences(self) -> list[str]:
        verdict = (
            f"{self.num_examples} examples, variance scale {self.scale:.4g}. "
            f"Recommended: {self.recommendation}."
        )
        return [verdict, self.reason, *self.warnings]

    def __str__(self) -> str:
        width = max(len(name) for name in self.scores)
        lines = [
            f"{name:{width}}{''.join(f'{value:>10}' for value in values)}   {gain}"
            for name, *values, gain in self._rows()
        ]
        return "\n".join([*lines, *self._sentences()])

    def _repr_html_(self) -> str:
        return html_table("Comparison", self._rows(), *self._sentences())


def conclude(
    entries: Mapping[str, Entry],
    scale: float,
    fitted: float | tuple[float, ...],
) -> Comparison:
    """The comparison that scored entries give, and what it says to use.

    The calibrated posterior competes with the better of the two network entries. It is
    recommended where its negative log likelihood is lower by more than two standard
    errors of the paired difference, and not where it is higher by as much. In between
    the joint log-likelihood decides; without one it is the network.

    Args:
        entries: The network, the network with something fitted, the posterior by
            evidence and the calibrated one, in this order.
        scale: Variance scale of the last.
        fitted: What was fitted for the second.
    """
    network, fitted_network, evidence, calibrated = entries.values()
    best_name, best = list(entries)[1], fitted_network
    # The simpler of the two unless the fitted one is better beyond doubt.
    gain, error = paired_difference(fitted_network.nll, network.nll)
    alone = best_name if gain < -SIGNIFICANT * error else NETWORK
    if gain >= 0:
        best_name, best = NETWORK, network
    gain, error = paired_difference(calibrated.nll, best.nll)
    difference = f"{abs(gain):.2g} ± {error:.1g} nats"
    if scale == 0 and torch.equal(calibrated.nll, network.nll):
        chosen = alone
        reason = "No variance at all predicts best here: the posterior adds nothing."
    elif abs(gain) > SIGNIFICANT * error:
        chosen = POSTERIOR if gain < 0 else best_name
        reason = (
            f"The calibrated posterior's negative log likelihood is "
            f"{'lower' if gain < 0 else 'higher'} than that of the {best_name} by "
            f"{difference}."
        )
    else:
        joint = [entry.scores.get("joint", math.nan) for entry in (calibrated, best)]
        chosen = POSTERIOR if joint[0] > joint[1] else alone
        judge = (
            "nothing else was scored, and the simpler one will do"
            if any(math.isnan(value) for value in joint)
            else f"the joint log-likelihood speaks for the {chosen}"
        )
        reason = (
            f"The negative log likelihoods of calibrated posterior and {best_name} "
            f"cannot be told apart ({difference}); {judge}."
        )
    loss, error = paired_difference(evidence.nll, network.nll)
    warning = (
        f"With hyperparameters from the evidence alone the posterior is worse than "
        f"the network by {loss:.2g} ± {error:.1g} nats; keep the calibrated scale."
    )
    return Comparison(
        scores={name: dict(entry.scores) for name, entry in entries.items()},
        gains={
            name: paired_difference(entry.nll, network.nll)
            for name, entry in entries.items()
        },
        scale=scale,
        fitted=fitted,
        num_examples=len(network.nll),
        recommendation=chosen,
        reason=reason,
        warnings=(warning,) if loss > SIGNIFICANT * error else (),
    )


def paired_difference(
    left: Float[Tensor, " n"], right: Float[Tensor, " n"]
) -> tuple[float, float]:
    """Mean of left - right over paired examples, and its standard error."""
    difference = left.double() - right.double()
    error = torch.std(difference) / math.sqrt(len(difference))
    return float(difference.mean()), float(error)


SCALES: tuple[float, ...] = (0.0, *(10 ** (i / 3) for i in range(-12, 13)))
"""Variance scales that are tried before the best is refined: 0 and 1e-4 to 1e4."""

_CHUNK = 2**22
"""Numbers of one temporary: with several of them alive, well below a GiB."""

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class HeldOut:
    """Held-out examples as a posterior sees them.

    Attributes:
        outputs: What the network says (n, C).
        mean: The posterior's mean (n, C).
        y: Targets.
        variance: Variance of each output, without noise (n, C).
        fluctuations: Samples around the mean (n, C, k), or None: then there is no
            Monte-Carlo link and no joint log-likelihood of the posterior.
    """

    outputs: Float[Tensor, "n C"]
    mean: Float[Tensor, "n C"]
    y: Tensor
    variance: Float[Tensor, "n C"]
    fluctuations: Float[Tensor, "n C k"] | None = None

    def labels(self) -> HeldOut:
        """Every output an example of its own, of two classes with logits (0, f)."""
        variance, g = self.variance, self.fluctuations
        f, varied = label_logits(self.outputs, variance.unsqueeze(-1))
        mean, added = label_logits(
            self.mean, variance.unsqueeze(-1) if g is None else g
        )
        y = self.y.flatten().long()
        return HeldOut(f, mean, y, varied[..., 0], None if g is None else added)

    def positions(self, likelihood: Categorical) -> HeldOut:
        """Every position that has a label an example of its own."""
        positioned = likelihood.with_targets(self.y, self.outputs.shape[1])
        counted = likelihood.counted(self.y)
        keep = slice(None) if counted is None else counted.flatten()

        def rows(tensor: Tensor) -> Tensor:
            return positioned.by_position(tensor)[keep]

        g = None if self.fluctuations is None else rows(self.fluctuations)
        tensors = (rows(t) for t in (self.outputs, self.mean, self.variance))
        outputs, mean, variance = tensors
        return HeldOut(outputs, mean, self.y.flatten()[keep], variance, g)

    def parts(self) -> Iterator[HeldOut]:
        """Consecutive examples, few enough to compute on at once."""
        samples = 1 if self.fluctuations is None else self.fluctuations.shape[2]
        size = max(1, _CHUNK // (self.outputs.shape[1] * samples))
        for rows in slices(len(self.outputs), size):
            g = None if self.fluctuations is None else self.fluctuations[rows]
            f, mean = self.outputs[rows], self.mean[rows]
            yield HeldOut(f, mean, self.y[rows], self.variance[rows], g)


@torch.no_grad()
def compare(
    likelihood: Likelihood,
    outputs: Float[Tensor, "n C"],
    y: Tensor,
    *,
    mean: Float[Tensor, "n C"] | None = None,
    fluctuations: Float[Tensor, "n C k"] | None = None,
    variance: Float[Tensor, "n C"] | None = None,
    link: Link = "probit",
    generator: torch.Generator | None = None,
) -> Comparison:
    """Fit the variance scale on held-out examples; compare with the network alone.

    The network alone gets a number fitted on the same examples too, so that the
    comparison is fair: a temperature for classes, a noise variance for regression.

    Args:
        likelihood: Of the targets.
        outputs: The network's outputs (n, C).
        y: Held-out targets, as the likelihood takes them.
        mean: The posterior's mean (n, C). Default: ``outputs``.
        fluctuations: Unscaled samples around the mean (n, C, k).
        variance: Their variance (n, C). Default: that of ``fluctuations``.
        link: From logits to probabilities. Default: "probit".
        generator: Pairs examples for the joint log-likelihood. Default: one with a
            fixed seed.

    Returns:
        Scores of network, fitted network, posterior by evidence (scale 1) and
        calibrated posterior, and which to use.

    Raises:
        TypeError: A likelihood without a calibration.
        ValueError: Fewer than two examples, neither fluctuations nor variance, values
            that are not finite, shapes that differ, or a link that is unknown or
            needs the fluctuations.
    """
    likelihood.check_targets(y, outputs.shape[1])
    n = len(outputs)
    if n < 2 or len(y) != n:
        raise ValueError(
            f"y: expected a target for each of at least two held-out examples, found "
            f"{len(y)} targets and {n} outputs"
        )
    check_link(link)
    if fluctuations is None and (link == "monte_carlo" or variance is None):
        raise ValueError("fluctuations: they are needed here, found None")
    if variance is None:
        assert fluctuations is not None
        variance = variance_of(fluctuations)
    check_finite("outputs", outputs)
    check_finite("variance", variance)
    if variance.shape != outputs.shape:
        raise ValueError(
            f"variance: expected the shape of outputs, {tuple(outputs.shape)}, found "
            f"{tuple(variance.shape)}"
        )
    if bool((variance < 0).any()):
        raise ValueError("variance: expected no negative value")
    y = y.to(outputs.device)
    outputs = outputs.detach()
    mean = outputs if mean is None else mean.detach()
    held_out = HeldOut(outputs, mean, y, variance.detach(), fluctuations)
    if isinstance(likelihood, Gaussian):
        return _compare_targets(likelihood, held_out)
    if isinstance(likelihood, Bernoulli):
        likelihood, held_out = Categorical(), held_out.labels()
    elif isinstance(likelihood, Categorical):
        held_out = held_out.positions(likelihood)
        likelihood = Categorical()
        if len(held_out.y) < 2:
            raise ValueError(f"y: {len(held_out.y)} held-out positions have a label")
    if isinstance(likelihood, Categorical):
        generator = generator or torch.Generator().manual_seed(0)
        return _compare_classes(likelihood, held_out, link, generator)
    raise TypeError(
        f"likelihood: expected Categorical, Bernoulli or Gaussian, found "
        f"{type(likelihood).__name__}"
    )


def best_scale(loss: Callable[[float], float]) -> float:
    """Variance scale with the least loss: a grid, then golden-section search.

    Args:
        loss: From a scale >= 0 to the loss of held-out examples.

    Returns:
        0, or a scale from 1e-4 to 1e4.
    """
    losses = [loss(scale) for scale in SCALES]
    best = min(range(len(SCALES)), key=losses.__getitem__)
    if best == 0:
        return 0.0
    low = math.log(SCALES[max(1, best - 1)])
    high = math.log(SCALES[min(best + 1, len(SCALES) - 1)])
    inner = [high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)]
    values = [loss(math.exp(point)) for point in inner]
    while high - low > 1e-3:
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - _GOLDEN * (high - low)
            values[0] = loss(math.exp(inner[0]))
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + _GOLDEN * (high - low)
            values[1] = loss(math.exp(inner[1]))
    refined = min(zip(values, inner, strict=True))
    # Where the loss has several minima, refining must not lose what the grid found.
    return math.exp(refined[1]) if refined[0] <= losses[best] else SCALES[best]


@torch.no_grad()
def best_temperature(outputs: Float[Tensor, "n C"], y: Tensor) -> float:
    """Temperature T with the least negative log likelihood of softmax(f / T).

    The loss is convex in 1 / T: Newton's method, kept inside a bracket (Guo et al.,
    On calibration of modern neural networks, 2017).

    Args:
        outputs: Logits f (n, C).
        y: Classes (n,).

    Returns:
        The temperature, from 0.01 to 100.
    """
    low, high, beta = 1e-2, 1e2, 1.0
    rows = max(1, _CHUNK // outputs.shape[1])
    for _ in range(60):
        slope = curvature = 0.0
        for f, classes in zip(outputs.split(rows), y.split(rows), strict=True):
            p = (beta * f).softmax(1)
            mean = (p * f).sum(1, keepdim=True)
            slope += float((mean - f.gather(1, _column(classes))).double().sum())
            curvature += float((p * (f - mean).square()).double().sum())
        low, high = (low, beta) if slope > 0 else (beta, high)
        step = beta - slope / curvature if curvature > 0 else high
        step = step if low < step < high else math.sqrt(low * high)
        if abs(math.log(step / beta)) < 1e-6:
            break
        beta = step
    return 1 / beta


def _log_probabilities(part: HeldOut, link: Link, scale: float) -> Tensor:
    """Log class probabilities (b, C) with the variances scaled."""
    if scale == 0:
        return part.mean.log_softmax(1)
    if link == "probit" or part.fluctuations is None:
        return log_probit(part.mean, scale * part.variance)
    return log_monte_carlo(part.mean, math.sqrt(scale) * part.fluctuations)


def _compare_classes(
    likelihood: Categorical, held_out: HeldOut, link: Link, generator: torch.Generator
) -> Comparison:
    """Compare for classification: a temperature against the posterior's variance."""
    seed = int(
        torch.randint(2**62, (), generator=generator, device=generator.device).item()
    )

    def entry(scale: float, temperature: float | None = None) -> Entry:
        rows: list[tuple[Tensor, ...]] = []
        targets = []
        for whole in held_out.parts():
            part = whole
            if temperature is not None:
                part = replace(whole, mean=whole.outputs / temperature)
            log_p = _log_probabilities(part, link, scale)
            p = log_p.exp()
            confidence, predicted = p.max(1)
            of_target = log_p.gather(1, _column(part.y)).squeeze(1).double()
            brier = p.double().square().sum(1) - 2 * of_target.exp() + 1
            rows.append((-of_target, confidence, predicted == part.y, brier))
            if scale == 0:
                targets.append(of_target.unsqueeze(1))
            elif part.fluctuations is not None:
                added = math.sqrt(scale) * part.fluctuations
                logits = part.mean.unsqueeze(-1) + added
                targets.append(likelihood.log_prob(logits, part.y))
        nll, confidence, correct, brier = map(torch.cat, zip(*rows, strict=True))
        joint = math.nan
        if targets:
            # Every entry meets the same pairs: differences are not those of the draw.
            pairs = torch.Generator().manual_seed(seed)
            joint = dyadic_joint_log_prob(torch.cat(targets), pairs)
        scores = {
            "nll": float(nll.mean()),
            "ece": reliability_of(confidence, correct).error,
            "brier": float(brier.mean()),
            "accuracy": float(correct.double().mean()),
            "joint": joint,
        }
        return Entry(nll, scores)

    def loss(scale: float) -> float:
        total = 0.0
        for part in held_out.parts():
            log_p = _log_probabilities(part, link, scale)
            total -= float(log_p.gather(1, _column(part.y)).double().sum())
        return total / len(held_out.outputs)

    scale = best_scale(loss)
    temperature = best_temperature(held_out.outputs, held_out.y)
    entries = {
        NETWORK: entry(0.0, 1.0),
        "network with temperature": entry(0.0, temperature),
        EVIDENCE: entry(1.0),
        CALIBRATED: entry(scale),
    }
    return conclude(entries, scale, temperature)


def _compare_targets(likelihood: Gaussian, held_out: HeldOut) -> Comparison:
    """Compare for regression: constant noise against the posterior's variance."""
    f, mean = held_out.outputs, held_out.mean
    y = held_out.y.reshape(f.shape).to(f)
    noise = likelihood.variance
    errors = (y - f).double().square().mean(0)
    fitted = errors.clamp_min(torch.finfo(torch.float32).tiny)
    best_noise: float | tuple[float, ...] = (
        float(fitted.mean()) if isinstance(noise, float) else tuple(fitted.tolist())
    )

    def nll(prediction: GaussianPrediction) -> Tensor:
        return -prediction.log_density(y).double() / y.shape[1]

    def alone(constant: float | tuple[float, ...]) -> GaussianPrediction:
        return GaussianPrediction(f, torch.zeros_like(f), constant)

    def posterior(scale: float) -> GaussianPrediction:
        return GaussianPrediction(mean, scale * held_out.variance, noise)

    def entry(prediction: GaussianPrediction) -> Entry:
        each = nll(prediction)
        flat = (
            prediction.mean.flatten(),
            prediction.target_variance.flatten(),
            y.flatten(),
        )
        scores = {
            "rmse": rmse(flat[0], flat[2]),
            "nll": float(each.mean()),
            "coverage": interval_coverage(*flat),
        }
        return Entry(each, scores)

    scale = best_scale(lambda scale: float(nll(posterior(scale)).mean()))
    entries = {
        NETWORK: entry(alone(noise)),
        "network with fitted noise": entry(alone(best_noise)),
        EVIDENCE: entry(posterior(1.0)),
        CALIBRATED: entry(posterior(scale)),
    }
    return conclude(entries, scale, best_noise)


def _column(y: Tensor) -> Tensor:
    return y.long().unsqueeze(1)
