"""The posterior of a linearised network: functions f(x) + J(x) (w - theta)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sgdgp.core.checks import check_count
from sgdgp.core.errors import StorageError
from sgdgp.core.files import reads
from sgdgp.core.processes import Processes
from sgdgp.core.seeds import generator_of, seed_of
from sgdgp.core.summary import Summarised
from sgdgp.networks.calibration import Comparison, compare
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.evidence import Evidence, linear_evidence, spectrum_of
from sgdgp.networks.expectation_maximisation import EMStep
from sgdgp.networks.fitting import CurvatureAt, Mean
from sgdgp.networks.hessian_free import HessianFree
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian, Likelihood
from sgdgp.networks.potential import Potential
from sgdgp.networks.predictive import (
    GaussianPrediction,
    Link,
    check_link,
    dyadic_joint_log_prob,
    joint_log_prob,
    label_logits,
    logit_variance,
    monte_carlo,
    mutual_information,
    predictive_entropy,
    probit,
    variance_of,
)
from sgdgp.networks.priors import PriorSettings, WeightPrior
from sgdgp.networks.storage import KIND, load_fields, save_fields
from sgdgp.networks.stream import Split, Stream, stream_of
from sgdgp.tangent import Tangent, TangentBatch

_KEPT_NUMBERS = 2**28
"""Most numbers of held-out fluctuations that are kept, a GiB of float32: without them
calibration does by variances, but has no joint log-likelihood of the posterior."""

Score: TypeAlias = Literal["entropy", "mutual_information", "variance"]
"""What tells strange inputs from usual ones."""

_OF_THIS_PROCESS = ("settings", "stream")
"""Attributes that know how the posterior came about; files and pickles do not."""

PREDICTED_TOGETHER = 256
"""Examples predicted at a time unless told otherwise: what a tangent takes at once."""


@dataclass(repr=False)
class LinearisedPosterior(Summarised):
    """Gaussian posterior over the functions of a linearised network.

    Its mean is what the network says, or the linear model, J(x) w; sample k adds
    sqrt(scale) J(x) w_k, the product of the Jacobian with a sampled change of the
    weights.

    Attributes:
        tangent: The network's Jacobian.
        likelihood: Of the targets, with the noise learned.
        prior: Of the weights, with the precisions learned.
        weight_samples: w_k (D, K).
        weight_mean: Optimum of the linear model (D, 1).
        num_examples: Training examples.
        mean_of: Whose outputs the mean is, "network" or "linear".
        reason: "finished" or "interrupted".
        history: How the precisions were learned.
        passes: Passes over the training data.
        seconds: Wall time of the fit.
        warnings: Sentences that say what a user may want to do.
        scale: Factor on all variances; ``calibrate`` sets it.
        curvature_at: Whose outputs the likelihood's Hessian was taken at. Posteriors
            of files that do not say so have it at those of the "linear" model.
        centre: Prior mean minus the network's weights (D, 1), of which the linear model
            is about: f(x) + J(x) (centre + w). None: it is J(x) w.
        settings: The prior as it was given, with what the evidence chose. Like
            ``stream`` it is not in files and pickles.
        stream: The training data.
    """

    tangent: Tangent
    likelihood: Likelihood
    prior: WeightPrior
    weight_samples: Float[Tensor, "D K"]
    weight_mean: Float[Tensor, "D 1"]
    num_examples: int
    mean_of: Mean = "network"
    reason: str = "finished"
    history: tuple[EMStep, ...] = ()
    passes: float = 0.0
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    scale: float = 1.0
    curvature_at: CurvatureAt = "linear"
    centre: Float[Tensor, "D 1"] | None = None
    settings: PriorSettings | None = None
    stream: Stream | None = None

    def _facts(self) -> dict[str, Any]:
        prior = self.prior if self.settings is None else self.settings
        return {
            "likelihood": type(self.likelihood).__name__,
            "prior": type(prior).__name__,
            "weights": len(self.weight_mean),
            "num_samples": self.num_samples,
            "num_examples": self.num_examples,
            "precisions": tuple(self.precisions.tolist()),
            "noise": self.noise,
            "effective_dimension": self.effective_dimension,
            "scale": self.scale,
            "mean_of": self.mean_of,
            "passes": self.passes,
            "seconds": self.seconds,
            "warnings": self.warnings,
            "reason": self.reason,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **dict.fromkeys(_OF_THIS_PROCESS)}

    @property
    def num_samples(self) -> int:
        """Posterior samples K."""
        return self.weight_samples.shape[1]

    @property
    def precisions(self) -> Float[Tensor, " G"]:
        """Learned prior precision of each group of weights (G,)."""
        return self.prior.precisions

    @property
    def noise(self) -> float | tuple[float, ...] | None:
        """Noise variance of a Gaussian likelihood, None for others."""
        return self.likelihood.variance

    @property
    def effective_dimension(self) -> float | None:
        """How many weights the data determine; None where nothing was learned."""
        return sum(self.history[-1].effective_dimension) if self.history else None

    @torch.no_grad()
    def network_outputs(self, x: Any) -> Float[Tensor, "b C"]:
        """What the network itself says (b, C)."""
        return torch.cat([self.tangent.outputs(part) for part in _parts(x)])

    @torch.no_grad()
    def linear_mean(self, x: Any) -> Float[Tensor, "b C"]:
        """The mean of the linear model (b, C): J(x) w, or f(x) + J(x) (centre + w)."""
        return torch.cat([self._linear_at(self.tangent.at(p)) for p in _parts(x)])

    def fluctuations(
        self, x: Any, *, batch_size: int = PREDICTED_TOGETHER
    ) -> tuple[Float[Tensor, "b C"], Float[Tensor, "b C K"]]:
        """The posterior's mean (b, C), and what the samples add to it (b, C, K)."""
        outputs, added = zip(*self._in_batches(x, batch_size), strict=True)
        return torch.cat(outputs), torch.cat(added)

    @torch.no_grad()
    def _in_batches(self, x: Any, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        for part in _parts(x, batch_size):
            at = self.tangent.at(part)
            added = at.jvp(self.weight_samples) * self.scale**0.5
            yield self._mean_at(at), added.contiguous()

    def _mean_at(self, at: TangentBatch) -> Float[Tensor, "b C"]:
        if self.mean_of == "network":
            return at.outputs
        return self._linear_at(at)

    def _linear_at(self, at: TangentBatch) -> Float[Tensor, "b C"]:
        if self.centre is None:
            return at.jvp(self.weight_mean)[..., 0]
        return at.outputs + at.jvp(self.centre + self.weight_mean)[..., 0]

    def samples(
        self, x: Any, *, batch_size: int = PREDICTED_TOGETHER
    ) -> Float[Tensor, "K b C"]:
        """Outputs of all sample functions at x (K, b, C)."""
        outputs, added = self.fluctuations(x, batch_size=batch_size)
        return (outputs.unsqueeze(-1) + added).permute(2, 0, 1)

    def variance(
        self,
        x: Any,
        method: HessianFree | None = None,
        *,
        batch_size: int = PREDICTED_TOGETHER,
        seed: int | torch.Generator = 0,
    ) -> Float[Tensor, "b C"]:
        """Variances of the outputs' functions (b, C), without a regression's noise.

        Args:
            x: Inputs as the network takes them; a tensor (b, ...) of any length.
            method: ``HessianFree()`` for those by the network's own Hessian, in place
                of the linear model's: what they differ by is what linearisation costs.
                It passes over the training data. Default: those of the samples.
            batch_size: Examples predicted at a time, by the samples.
            seed: Of what ``method`` draws.

        Raises:
            TypeError: ``method`` is none.
            ValueError: ``method`` needs training data, which files do not hold: give
                ``method.variance`` a ``Potential.of(posterior, loader)``.
        """
        if method is None:
            batches = self._in_batches(x, batch_size)
            return torch.cat([variance_of(added) for _, added in batches])
        if not isinstance(method, HessianFree):
            raise TypeError(f"method: expected HessianFree() or None, found {method!r}")
        mean = self.weight_mean if self.curvature_at == "linear" else None
        found = method.variance(Potential.of(self), x, weight_mean=mean, seed=seed)
        return found.variance * self.scale

    def predict(
        self, x: Any, link: Link = "probit", *, batch_size: int = PREDICTED_TOGETHER
    ) -> Float[Tensor, "b *P C"] | GaussianPrediction:
        """Class or label probabilities (b, C), or a regression's mean and variance.

        Examples with several positions have probabilities (b, P, C).

        Args:
            x: Inputs as the network takes them; a tensor (b, ...) of any length.
            link: "probit", which needs variances only, or "monte_carlo" over the
                samples. Regression has neither.
            batch_size: Examples predicted at a time.

        Raises:
            ValueError: No such link.
        """
        check_link(link)
        batches = self._in_batches(x, batch_size)
        if isinstance(self.likelihood, Gaussian):
            parts = [(outputs, variance_of(added)) for outputs, added in batches]
            mean, variance = map(torch.cat, zip(*parts, strict=True))
            return GaussianPrediction(mean, variance, self.likelihood.variance)
        return torch.cat([self._probabilities(f, added, link) for f, added in batches])

    def _probabilities(self, f: Tensor, added: Tensor, link: Link) -> Tensor:
        if isinstance(self.likelihood, Bernoulli):
            each = _linked(*label_logits(f, added), link)
            return each[:, 1].reshape(f.shape)
        f, g = self._classified(f), self._classified(added)
        each = _linked(f, g, link)
        return each if len(f) == len(added) else each.unflatten(0, (len(added), -1))

    def _classified(self, outputs: Tensor) -> Tensor:
        """Outputs (b, C, ...) with every position of classes an example."""
        likelihood = self.likelihood
        if isinstance(likelihood, Categorical):
            return likelihood.by_position(outputs)
        return outputs

    def system(
        self, stream: Stream, curvature_at: CurvatureAt | None = None
    ) -> WeightSystem:
        """The system that the samples are draws of, one pass over the training data.

        Args:
            stream: The training data.
            curvature_at: Outputs of the likelihood's Hessian. Default: the samples'.
        """
        data = TangentData(self.tangent, stream, self.likelihood, self.centre)
        if (curvature_at or self.curvature_at) == "network":
            outputs = data.network_outputs
        else:
            outputs = data.outputs_of(self.weight_mean)
        return WeightSystem(data, self.prior, self.likelihood, outputs)

    @torch.no_grad()
    def log_marginal_likelihood(
        self,
        loader: Any,
        *,
        num_probes: int = 8,
        split: Split | None = None,
        seed: int | torch.Generator = 0,
    ) -> Evidence:
        """Estimate the evidence log p(y | x) of prior and weights on training data.

        It is that of the linear model by Laplace's approximation, exact for a Gaussian
        likelihood: with the curvature at its optimum, whatever ``curvature_at``. In a
        group of processes all of them have to call this.

        Args:
            loader: The training data, as ``fit`` took them.
            num_probes: Lanczos runs; the standard error falls with their root. Up to
                512 weights, or where "auto" factorises, none are needed.
            split: From what the loader yields to (inputs, targets).
            seed: Of the probes.

        Returns:
            The value, in nats and not divided by n, and its standard error.
        """
        check_count("num_probes", num_probes, 2)
        stream = stream_of(loader, self.tangent.device, split)
        system = self.system(stream, "linear")
        outputs = system.outputs
        self.likelihood.check_targets(system.data.targets, outputs.shape[1])
        spectrum = spectrum_of(system, num_probes, seed_of(generator_of(seed)))
        mean = self.prior.whiten(self.weight_mean)
        loss = float(system.loss(outputs.unsqueeze(-1))[0])
        return linear_evidence(mean, loss, spectrum)

    def joint_log_prob(
        self,
        x: Any,
        y: Tensor,
        *,
        dyadic: bool = False,
        seed: int | torch.Generator = 0,
        batch_size: int = PREDICTED_TOGETHER,
    ) -> float:
        """Log probability of all targets together, log mean_k prod_n p_k(y_n).

        Args:
            x: Inputs.
            y: Their targets.
            dyadic: Instead the mean over random pairs of inputs with ten labels in
                all, per label: comparable between data sets of different sizes.
            seed: Draws the pairs.
            batch_size: Examples predicted at a time.
        """
        outputs, added = self.fluctuations(x, batch_size=batch_size)
        self.likelihood.check_targets(y, outputs.shape[1])
        if len(y) != len(outputs):
            raise ValueError(
                f"y: expected {len(outputs)} targets, one for each of x, found {len(y)}"
            )
        log_probs = self.likelihood.log_prob(outputs.unsqueeze(-1) + added, y)
        if dyadic:
            return dyadic_joint_log_prob(log_probs, generator_of(seed))
        return joint_log_prob(log_probs)

    def out_of_distribution_score(
        self, x: Any, score: Score = "entropy", *, batch_size: int = PREDICTED_TOGETHER
    ) -> Float[Tensor, " b"]:
        """How unlike the training data inputs are (b,); higher is stranger.

        Args:
            x: Inputs.
            score: "entropy" of the probit prediction, doubt of any kind;
                "mutual_information", what the label would tell about the weights;
                "variance" of the outputs. Regression has variances only.
            batch_size: Examples at a time.

        Raises:
            ValueError: No such score, or one that regression has not.
        """
        if score not in get_args(Score):
            raise ValueError(
                f"score: expected one of {', '.join(get_args(Score))}, found {score!r}"
            )
        if isinstance(self.likelihood, Gaussian) and score != "variance":
            raise ValueError(f'score: regression has "variance" only, found {score!r}')
        return torch.cat(
            [
                self._score(outputs, added, score)
                for outputs, added in self._in_batches(x, batch_size)
            ]
        )

    def _score(self, outputs: Tensor, added: Tensor, score: Score) -> Tensor:
        labels = isinstance(self.likelihood, Bernoulli)
        if score == "variance":
            if labels or isinstance(self.likelihood, Gaussian):
                return variance_of(added).mean(1)
            each = logit_variance(self._classified(added))
            return each.view(len(added), -1).mean(1)
        # The labels of an example are independent: their doubts add up.
        if labels:
            f, g = label_logits(outputs, added)
        else:
            f, g = self._classified(outputs), self._classified(added)
        if score == "entropy":
            found = predictive_entropy(probit(f, variance_of(g)))
        else:
            found = mutual_information(f, g)
        return found.view(len(outputs), -1).sum(1)

    @torch.no_grad()
    def calibrate(
        self,
        loader: Any,
        *,
        link: Link = "probit",
        split: Split | None = None,
        seed: int | torch.Generator = 0,
    ) -> Comparison:
        """Set ``scale`` by held-out examples, and compare with the network alone.

        The evidence may leave too much or too little variance, and a network that is
        well calibrated already may be better off without a posterior: the comparison
        says so.

        Args:
            loader: Held-out examples, as ``fit`` takes its data; not those of training.
            link: From logits to probabilities, for classes.
            split: From what the loader yields to (inputs, targets).
            seed: Pairs examples for the joint log-likelihood.

        Returns:
            Scores of the network alone, of that with a fitted temperature (or noise),
            of the posterior by evidence and calibrated, and a recommendation;
            ``print`` it.
        """
        check_link(link)
        stream = stream_of(loader, self.tangent.device, split, Processes())
        outputs, means, targets, variances, kept = [], [], [], [], []
        numbers = stream.num_examples * self.num_samples
        for batch in stream:
            at = self.tangent.at(batch.x)
            self.likelihood.check_targets(batch.y, at.outputs.shape[1])
            added = at.jvp(self.weight_samples)
            outputs.append(at.outputs)
            means.append(self._mean_at(at))
            targets.append(batch.y)
            variances.append(variance_of(added))
            if numbers * added.shape[1] <= _KEPT_NUMBERS:
                kept.append(added)
            elif link == "monte_carlo":
                raise ValueError(
                    f"loader: {stream.num_examples} examples with {added.shape[1]} "
                    f"outputs and {self.num_samples} samples are too many to keep; use "
                    'link="probit" or fewer examples'
                )
        comparison = compare(
            self.likelihood,
            torch.cat(outputs),
            torch.cat(targets),
            mean=torch.cat(means),
            fluctuations=torch.cat(kept) if kept else None,
            variance=torch.cat(variances),
            link=link,
            generator=generator_of(seed),
        )
        self.scale = comparison.scale
        self.warnings = (*self.warnings, *comparison.warnings)
        return comparison

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior to a file; ``sgdgp.networks.load`` reads it.

        The network is not in it, a fingerprint of its weights is.

        Raises:
            StorageError: Nothing can be written there.
            NotStorableError: A likelihood of the user's own is not registered for it.
            TypeError: ``path`` is no path.
            OSError: The disk is full; an old file is untouched.
        """
        own = {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if field.name not in ("tangent", *_OF_THIS_PROCESS)
        }
        save_fields(path, self.tangent, own)


@reads(KIND)
def load(
    path: str | os.PathLike[str],
    network: nn.Module,
    *,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
) -> LinearisedPosterior:
    """Read a posterior that was saved; it predicts the same numbers.

    Args:
        path: The file.
        network: The network that was linearised, with the same weights and buffers;
            it may be on another device, and the posterior will be there.
        output: As it was given to ``linearise``; a function is not in the file.
        memory_budget: Bytes for temporaries. Default: half of what is free.

    Raises:
        StorageError: The file is missing, damaged, of another kind or of a newer
            format; or the network is another one, which names what differs.
        TypeError: An argument is of the wrong kind.

    Example:
        >>> posterior.save("posterior.safetensors")
        >>> same = sgdgp.networks.load("posterior.safetensors", network)
    """
    tangent, own = load_fields(
        path, network, output=output, memory_budget=memory_budget
    )
    try:
        return LinearisedPosterior(tangent=tangent, **own)
    except TypeError as error:
        raise StorageError(f"{path} does not fit this version: {error}") from error


def _linked(f: Tensor, added: Tensor, link: Link) -> Tensor:
    """Probabilities by a link."""
    return probit(f, variance_of(added)) if link == "probit" else monte_carlo(f, added)


def _parts(x: Any, size: int = PREDICTED_TOGETHER) -> Iterator[Any]:
    """A tensor of inputs in parts; anything else as it is."""
    check_count("batch_size", size, 1)
    if not isinstance(x, Tensor):
        if not isinstance(x, Mapping | tuple):
            raise TypeError(
                "x: expected a tensor, or a tuple or dict of them as the network takes "
                f"it, found {type(x).__name__}"
            )
        yield x
        return
    if x.ndim == 0 or len(x) == 0:
        raise ValueError(f"x: expected inputs, found shape {tuple(x.shape)}")
    yield from x.split(size)
