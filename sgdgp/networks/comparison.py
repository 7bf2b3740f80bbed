"""Whether a posterior predicts better than its network alone, measured and said."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

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


@dataclass(frozen=True)
class Comparison:
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

    def __str__(self) -> str:
        columns = list(next(iter(self.scores.values())))
        width = max(len(name) for name in self.scores)
        head = "".join(f"{name:>10}" for name in columns)
        lines = [f"{'':{width}}{head}   nll - network's"]
        for name, scores in self.scores.items():
            values = "".join(f"{scores[column]:10.4f}" for column in columns)
            gain, error = self.gains[name]
            lines.append(f"{name:{width}}{values}   {gain:+.4f} ± {error:.4f}")
        lines.append(
            f"{self.num_examples} examples, variance scale {self.scale:.4g}. "
            f"Recommended: {self.recommendation}."
        )
        return "\n".join([*lines, self.reason, *self.warnings])


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
    if scale == 0:
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
    warnings = []
    loss, error = paired_difference(evidence.nll, network.nll)
    if loss > SIGNIFICANT * error:
        warnings.append(
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
        warnings=tuple(warnings),
    )


def paired_difference(
    left: Float[Tensor, " n"], right: Float[Tensor, " n"]
) -> tuple[float, float]:
    """Mean of left - right over paired examples, and its standard error."""
    difference = left.double() - right.double()
    error = torch.std(difference) / math.sqrt(len(difference))
    return float(difference.mean()), float(error)
