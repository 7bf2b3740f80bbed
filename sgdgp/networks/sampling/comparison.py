"""Two posteriors of a network side by side: weight by weight, and by what they predict.

Weights compare only within one frame: copies of a network that differ by a symmetry
have other weights and the same outputs, so draws are aligned first (``align``). Outputs
compare without. Agreement of the likeliest classes and total variation of the
predictive probabilities, 1/2 sum |p - q|, are the scores of Wilson et al., "Evaluating
approximate inference in Bayesian deep learning" (NeurIPS competition, 2021).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.seeds import number_of
from sgdgp.metrics import accuracy, negative_log_likelihood, rmse
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.predictive import GaussianPrediction
from sgdgp.networks.sampling.compact import CompactGaussian
from sgdgp.networks.sampling.draws import Draws, Model

Side: TypeAlias = Draws | CompactGaussian | LinearisedPosterior
"""A posterior: draws, a Gaussian of weights, or linearised."""

_UNRELATED = 0.5
"""Correlation of means below which two Gaussians are hardly of one mode."""


@dataclass(frozen=True)
class WeightComparison:
    """Gaussians of independent weights, side by side.

    Attributes:
        mean_correlation: Of the means.
        deviation_correlation: Of the logarithms of the standard deviations.
        deviation_ratio: Median of the first's deviation over the second's.
        divergence: KL(first || second) in nats, correlations left out.
    """

    mean_correlation: float
    deviation_correlation: float
    deviation_ratio: float
    divergence: float


@dataclass(frozen=True)
class FunctionComparison:
    """Predictions at some inputs, side by side.

    Attributes:
        deviation_correlation: Of the outputs' standard deviations.
        deviation_ratio: Median of the first's deviation over the second's.
        agreement: How often both find the same class (or label) likeliest.
        total_variation: 1/2 sum |p - q|, the mean over inputs.
        mean_difference: Root mean square of the difference of regression means, in
            deviations of the second.
        scores: "accuracy" and "nll", or "rmse" and "nll", of each, given targets.
    """

    deviation_correlation: float
    deviation_ratio: float
    agreement: float | None = None
    total_variation: float | None = None
    mean_difference: float | None = None
    scores: dict[str, tuple[float, float]] | None = None


@dataclass(frozen=True)
class PosteriorComparison:
    """What two posteriors have in common; ``print`` it.

    Attributes:
        weights: Weight by weight.
        function: At the inputs that were given.
        caveats: Sentences that say how to read it.
    """

    weights: WeightComparison
    function: FunctionComparison | None = None
    caveats: tuple[str, ...] = ()

    def __str__(self) -> str:
        w, f = self.weights, self.function
        lines = [
            f"weights: correlation of means {w.mean_correlation:.3f}, of log "
            f"deviations {w.deviation_correlation:.3f}; median ratio of deviations "
            f"{w.deviation_ratio:.3g}; KL {w.divergence:.4g} nats"
        ]
        if f is not None:
            lines.append(
                "function: correlation of deviations "
                f"{f.deviation_correlation:.3f}, median ratio {f.deviation_ratio:.3g}"
            )
            if f.agreement is not None:
                lines[-1] += (
                    f"; agreement {f.agreement:.1%}, total variation "
                    f"{f.total_variation:.3f}"
                )
            if f.mean_difference is not None:
                lines[-1] += f"; means {f.mean_difference:.3g} deviations apart"
            for name, (first, second) in (f.scores or {}).items():
                lines.append(f"{name}: {first:.4g} and {second:.4g}")
        return "\n".join([*lines, *self.caveats])


@torch.no_grad()
def compare(
    first: Side,
    second: Side,
    *,
    model: Model | None = None,
    x: Any = None,
    y: Tensor | None = None,
    samples: int = 200,
    seed: int | torch.Generator = 0,
) -> PosteriorComparison:
    """Two posteriors of one network side by side.

    Args:
        first: Draws (aligned), a ``CompactGaussian``, or a ``LinearisedPosterior``.
        second: Another; the one to be held against.
        model: The potential or linearised posterior that knows the network, for x.
        x: Inputs at which predictions are compared. Default: weights only.
        y: Their targets, for scores.
        samples: Networks that a Gaussian of weights is sampled for, for x.
        seed: Of these samples, the same for both.

    Raises:
        TypeError: A side is nothing of these.
        ValueError: They have other numbers of weights, or x comes without a model.
    """
    check_count("samples", samples, 2)
    if (x is None) != (model is None):
        raise ValueError("x: expected it and model, or neither")
    if y is not None and x is None:
        raise ValueError("y: expected x beside it")
    seed = number_of(seed)  # once: both sides begin it anew
    p, q = _gaussian("first", first), _gaussian("second", second)
    if p.names and q.names and p.names != q.names:
        raise ValueError(
            f"second: expected weights {list(p.names)} as the first has, found "
            f"{list(q.names)}"
        )
    weights = _compare_weights(p, q)
    caveats = []
    for sentence in dict.fromkeys((*p.warnings, *q.warnings)):
        whose = "Both" if sentence in p.warnings else "The second"
        if sentence not in q.warnings:
            whose = "The first"
        caveats.append(f"{whose}: {sentence}")
    if p.deviations != q.deviations:
        caveats.append(
            f"The first's deviations are {p.deviations}, the second's {q.deviations}: "
            "those given all other weights are smaller wherever weights are "
            "correlated, however good either is."
        )
    if weights.mean_correlation < _UNRELATED:
        caveats.append(
            "The means hardly correlate: copies of the network by a symmetry (align "
            "both to one reference), different modes, or weights that the data do "
            "not determine."
        )
    function = None
    if x is not None and model is not None:
        outputs = [
            _outputs(side, gaussian, model, x, samples, seed)
            for side, gaussian in ((first, p), (second, q))
        ]
        function = _compare_functions(model.likelihood, outputs, y)
    return PosteriorComparison(weights, function, tuple(caveats))


def _gaussian(name: str, side: Any) -> CompactGaussian:
    if isinstance(side, CompactGaussian):
        return side
    if isinstance(side, Draws):
        return CompactGaussian.of(side)
    if isinstance(side, LinearisedPosterior):
        return CompactGaussian.of_posterior(side)
    raise TypeError(
        f"{name}: expected Draws, a CompactGaussian or a LinearisedPosterior, found "
        f"{type(side).__name__}"
    )


def _compare_weights(p: CompactGaussian, q: CompactGaussian) -> WeightComparison:
    divergence = p.independent.divergence(q.independent)
    own, other = p.standard_deviation, q.standard_deviation
    return WeightComparison(
        _correlation(p.mean, q.mean),
        _correlation(own.log(), other.log()),
        float((own / other).median()),
        divergence,
    )


def _outputs(
    side: Side,
    gaussian: CompactGaussian,
    model: Model,
    x: Any,
    samples: int,
    seed: int,
) -> Float[Tensor, "K b C"]:
    if isinstance(side, LinearisedPosterior):
        return side.samples(x)
    if isinstance(side, CompactGaussian):
        tangent = model.tangent
        rows = gaussian.sample(samples, seed=seed)
        side = Draws(rows.unsqueeze(0), tangent.names, tangent.shapes)
    return side.function(model, x).flatten(0, 1)


def _compare_functions(
    likelihood: Any, outputs: list[Tensor], y: Tensor | None
) -> FunctionComparison:
    """Of two sides' outputs, (K, b, C) each."""
    outputs = [each.double() for each in outputs]
    own, other = (each.std(0).flatten() for each in outputs)
    deviations = (_correlation(own.log(), other.log()), float((own / other).median()))
    if isinstance(likelihood, Gaussian):
        means = [each.mean(0) for each in outputs]
        apart = (means[0] - means[1]).flatten() / other
        return FunctionComparison(
            *deviations,
            mean_difference=float(apart.square().mean().sqrt()),
            scores=None if y is None else _regression_scores(likelihood, outputs, y),
        )
    if not isinstance(likelihood, Categorical | Bernoulli):
        return FunctionComparison(*deviations)
    p, q = (_probabilities(likelihood, each) for each in outputs)
    scores = None
    if y is not None:
        counted = likelihood.counted(y)
        # Positions without a label have no score.
        at = slice(None) if counted is None else counted.flatten()
        classes = y.flatten().long()[at]
        scores = {
            name: (score(p[at], classes), score(q[at], classes))
            for name, score in (
                ("accuracy", accuracy),
                ("nll", negative_log_likelihood),
            )
        }
    return FunctionComparison(
        *deviations,
        agreement=float((p.argmax(1) == q.argmax(1)).double().mean()),
        total_variation=float(0.5 * (p - q).abs().sum(1).mean()),
        scores=scores,
    )


def _probabilities(
    likelihood: Categorical | Bernoulli, outputs: Float[Tensor, "K b C"]
) -> Float[Tensor, "n P"]:
    """Mean probabilities of classes; of each label whether it is 0 or 1."""
    if isinstance(likelihood, Bernoulli):
        one = outputs.sigmoid().mean(0).flatten()
        return torch.stack([1 - one, one], 1)
    columns = outputs.permute(1, 2, 0)
    return likelihood.by_position(columns).softmax(1).mean(-1)


def _regression_scores(
    likelihood: Gaussian, outputs: list[Tensor], y: Tensor
) -> dict[str, tuple[float, float]]:
    found = [
        GaussianPrediction(each.mean(0), each.var(0, correction=0), likelihood.variance)
        for each in outputs
    ]
    a, b = (
        (
            rmse(p.mean.flatten(), y.to(p.mean).flatten()),
            -float(p.log_density(y).mean()),
        )
        for p in found
    )
    return {"rmse": (a[0], b[0]), "nll": (a[1], b[1])}


def _correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.stack([a.double(), b.double()]).corrcoef()[0, 1])
