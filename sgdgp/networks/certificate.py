"""PAC-Bayes certificates: what the risk of a network on a new task is at most.

The class of predictors is the linear model about weights that the target's examples
have not seen, with the prior that another task has taught (``LearnedPrior``); Q is any
Gaussian over its weights, so the examples may choose it freely: ``gibbs.py`` takes the
one with the smallest bound. What they must not choose is the prior. Of its scale and
strength there is a grid, fixed beforehand, all members of which share delta.

With the N x N kernels of the rows all divergences are exact. The Gibbs risk is in
closed form where the loss is of each output by itself; else it is by draws that the
choice of Q has not seen, and their share of delta.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_positive
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.memory import resolve_budget
from sgdgp.core.processes import Processes
from sgdgp.core.seeds import derived_generator, generator_of, seed_of, standard_normal
from sgdgp.networks.bounds import (
    catoni_bound,
    inverse_kl_bound,
    mcallester_bound,
    mean_bound,
)
from sgdgp.networks.curvature import TangentData
from sgdgp.networks.gibbs import (
    BoundedLoss,
    Found,
    OutputPosterior,
    OutputPrior,
    error_rate,
    label_error,
    normal_draws,
    out_of_tolerance,
    smallest_bound,
)
from sgdgp.networks.learned_prior import LearnedPrior
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.priors import WeightPrior
from sgdgp.networks.priors.base import no_probes
from sgdgp.networks.stream import Split, example_hashes, stream_of

_SCALES = tuple(10.0**k for k in range(-3, 6))
"""Precisions of the largest group of weights, relative to the prior's own: a bound is
as flat in it as the evidence, and each costs delta."""

_OTHER_SCALES = tuple(10.0**k for k in range(-2, 3))
"""Those of another group, what is new in the target."""

_SHARE_OF_ONE = 0.5
"""Of delta, of the scale and the strength that are the source's: an equal share of so
many would cost what a learned prior gains."""

_SHARE_OF_DRAWS = 0.1
"""Of delta, where the risk is by draws."""

_SEARCH_DRAWS = 128
"""Draws that tell posteriors apart where nothing else does, the same for all."""

_DEVIATIONS = 2.0
"""Of the source's noise: what a regression may be off by."""

_LIVE_COLUMNS = 6
"""Blocks (D, k) that drawing k samples of Q takes, temporaries of a pass included."""

_TABLES = 8
"""Matrices (N, N) that a certificate needs at a time, beside those of the groups."""

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Certificate:
    """With probability 1 - delta the risk of Q is below ``bound``.

    The risk is that of the Gibbs predictor, which draws weights anew for each
    prediction; ``posterior`` is Q, to be used as any other.

    Attributes:
        bound: By the inverse of the binary kl.
        mcallester: The same by McAllester, never below.
        catoni: The same by Catoni, another bound: one of the two is to be chosen
            beforehand.
        risk: Gibbs risk of Q on the examples.
        risk_upper: What the bounds are of: the risk, or what it is at most by draws.
        kl: KL(Q || P) in nats.
        delta: Probability with which the certificate may be wrong.
        num_examples: n.
        num_draws: Draws that the risk is by; 0: it is exact.
        num_priors: Priors that share delta.
        precisions: Of each group of weights in the one that was chosen.
        strength: Its strength.
        loss: In words.
        tolerance: What a regression may be off by, one or one for each output.
        chance: Risk of a guess.
        assumptions: What has to be true that no program can check.
        posterior: Q.
    """

    bound: float
    mcallester: float
    catoni: float
    risk: float
    risk_upper: float
    kl: float
    delta: float
    num_examples: int
    num_draws: int
    num_priors: int
    precisions: tuple[float, ...]
    strength: float
    loss: str
    tolerance: float | tuple[float, ...] | None
    chance: float
    assumptions: tuple[str, ...] = field(repr=False)
    posterior: LinearisedPosterior = field(repr=False)
    _loss: BoundedLoss = field(repr=False)

    @property
    def is_vacuous(self) -> bool:
        """Whether a guess has a risk as low as the bound."""
        return self.bound >= self.chance

    @torch.no_grad()
    def gibbs_risk(self, loader: Any, *, split: Split | None = None) -> float:
        """The risk of Q's samples on other examples, what the bound is of.

        Args:
            loader: Examples as ``certify`` takes them.
            split: From what the loader yields to (inputs, targets).
        """
        stream = stream_of(loader, self.posterior.tangent.device, split, Processes())
        total = 0.0
        for batch in stream:
            outputs, added = self.posterior.fluctuations(batch.x)
            self.posterior.likelihood.check_targets(batch.y, outputs.shape[1])
            # Q is without the factor that calibrate may have set since.
            added = added * self.posterior.scale**-0.5
            losses = self._loss(outputs.unsqueeze(-1) + added, batch.y)
            total += float(losses.mean(1).sum())
        return total / stream.num_examples

    def __str__(self) -> str:
        exact = f"{self.num_draws} draws" if self.num_draws else "exact"
        lines = [
            f"{self.loss}: below {self.bound:.4f} with probability {1 - self.delta:g}"
            + (" (vacuous)" if self.is_vacuous else ""),
            f"  risk on {self.num_examples} examples  {self.risk:.4f} ({exact}), at "
            f"most {self.risk_upper:.4f}",
            f"  KL(Q || P)  {self.kl:.2f} nats, P one of {self.num_priors} priors",
            f"  McAllester  {self.mcallester:.4f}, Catoni {self.catoni:.4f}",
            "  if",
            *(f"  - {sentence}" for sentence in self.assumptions),
        ]
        return "\n".join(lines)


@outside_inference_mode
@torch.no_grad()
def certify(
    posterior: LinearisedPosterior,
    loader: Any,
    *,
    delta: float = 0.05,
    loss: Loss | None = None,
    tolerance: float | Sequence[float] | Tensor | None = None,
    num_draws: int = 4000,
    final_samples: int = 64,
    split: Split | None = None,
    seed: int | torch.Generator = 0,
) -> Certificate:
    """Bound the risk of a network on the task that its posterior was fitted to.

    Args:
        posterior: Of ``linearise(network, likelihood, prior=LearnedPrior(...))``, the
            network with the source's weights. Where it was fitted only tells where the
            search for Q begins; its ``scale`` does not enter.
        loader: Examples of the target, those of the fit or others, none of which the
            prior has seen.
        delta: Probability with which the certificate may be wrong.
        loss: From outputs (b, C, k) and targets to losses (b, k) in [0, 1]. Default:
            classification error (of positions, labels), ties being errors; for
            regression, which part of the outputs is off by more than the tolerance.
        tolerance: In units of the targets, one or one for each output, chosen without
            the examples. Default: two standard deviations of the source's noise.
        num_draws: Draws of Q where the risk is not in closed form.
        final_samples: Samples of Q as a posterior over weights.
        split: From what the loader yields to (inputs, targets).
        seed: Of the draws.

    Returns:
        The certificate; ``print`` it.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: The certificate would be false; says why. Or an argument is out of
            range, or there are too many rows for exact divergences.

    Example:
        >>> certificate = sgdgp.networks.certify(posterior, target_loader)
        >>> print(certificate)
    """
    if not isinstance(posterior, LinearisedPosterior):
        raise TypeError(
            "posterior: expected what linearise(...).fit(...) returns, found "
            f"{type(posterior).__name__}"
        )
    check_positive("delta", delta)
    if delta >= 1:
        raise ValueError(f"delta: expected a probability in (0, 1), found {delta}")
    check_count("num_draws", num_draws, 2)
    check_count("final_samples", final_samples, 2)
    settings = _data_free(posterior)
    limit = _tolerance(posterior, settings, loss, tolerance)
    tangent, likelihood = posterior.tangent, posterior.likelihood
    stream = stream_of(loader, tangent.device, split, Processes())
    hashes = example_hashes(stream)
    found = int(torch.isin(hashes, settings.seen.to(stream.device)).sum())
    if found:
        raise ValueError(
            f"loader: {found} of {stream.num_examples} examples are among those that "
            "the prior has seen; a certificate needs others"
        )
    data = TangentData(tangent, stream, likelihood, posterior.centre)
    likelihood.check_targets(data.targets, data.network_outputs.shape[1])
    bounded = _bounded_loss(posterior, data, loss, limit)
    _check_size(data, posterior.prior)
    seed = seed_of(generator_of(seed))
    search = _Search(data, posterior, settings, bounded, delta, seed)
    best, place = search.smallest()
    share = search.share(place)
    draws, upper, risk = 0, best.risk, best.risk
    if not bounded.is_exact:
        generator = derived_generator(seed, "risk of a certificate")
        fresh = normal_draws(best.posterior.prior, num_draws, generator)
        risks = best.posterior.drawn_risks(bounded, data.targets, fresh)
        risk, draws = float(risks.mean()), num_draws
        upper = min(1.0, mean_bound(risks, _SHARE_OF_DRAWS * delta))
    n, kl = stream.num_examples, float(best.posterior.kl)
    strength = search.axes[0][place[0]]
    q = _in_weights(
        replace(posterior, settings=replace(settings, strength=strength)),
        data,
        search.prior_at(place),
        best.posterior,
        final_samples,
        seed,
    )
    return Certificate(
        bound=inverse_kl_bound(upper, kl, n, share),
        mcallester=mcallester_bound(upper, kl, n, share),
        catoni=catoni_bound(upper, kl, n, share),
        risk=risk,
        risk_upper=upper,
        kl=kl,
        delta=delta,
        num_examples=n,
        num_draws=draws,
        num_priors=search.num_priors,
        precisions=tuple(q.prior.precisions.tolist()),
        strength=strength,
        loss=bounded.name,
        tolerance=limit,
        chance=bounded.chance,
        assumptions=_assumptions(settings, search, n, n - len(hashes.unique()), limit),
        posterior=q,
        _loss=bounded,
    )


class _Search:
    """The grid of priors, and the one with the smallest bound of those around.

    A place is the number of a strength, and those of the precisions of each group.
    """

    def __init__(
        self,
        data: TangentData,
        posterior: LinearisedPosterior,
        settings: LearnedPrior,
        loss: BoundedLoss,
        delta: float,
        seed: int,
    ) -> None:
        self.data, self.posterior, self.settings = data, posterior, settings
        self.loss = loss
        assert settings.strength is not None
        strengths = sorted({*settings.tried, 1.0}) if settings.tried else []
        sizes = posterior.prior.group_sizes
        self.main = 1 + sizes.index(max(sizes))
        self.axes: list[Sequence[float]] = [strengths or [settings.strength]]
        self.axes += [_OTHER_SCALES] * len(sizes)
        self.axes[self.main] = _SCALES
        self._delta = delta if loss.is_exact else (1 - _SHARE_OF_DRAWS) * delta
        self._draws: Tensor | None = None
        if loss.expected is None:
            # As many as rows: kernels have that many eigenvalues, whichever prior's.
            generator = derived_generator(seed, "search of a certificate")
            like = data.network_outputs.double()
            self._draws = standard_normal(
                _SEARCH_DRAWS, like.numel(), like=like, generator=generator
            ).mT
        self._priors: dict[float, WeightPrior] = {}
        self._last: tuple[tuple[float, tuple[float, ...]], OutputPrior] | None = None
        self._bounds: dict[tuple[int, ...], float] = {}
        self._best: tuple[Found, tuple[int, ...]] | None = None

    @property
    def num_priors(self) -> int:
        """Of the grid."""
        return math.prod(map(len, self.axes))

    def share(self, place: Sequence[int]) -> float:
        """Of delta, that a prior has: half of it what is as the source left it."""
        found = self._delta
        for axis, k in zip(self.axes, place, strict=True):
            if len(axis) > 1:
                others = (1 - _SHARE_OF_ONE) / (len(axis) - 1)
                found *= _SHARE_OF_ONE if axis[k] == 1.0 else others
        return found

    def smallest(self) -> tuple[Found, tuple[int, ...]]:
        """Down the bound, from the fit, the mean alone, and the source's own scales.

        Of strengths that the fit has chosen among, the source's own may be far off, and
        has the largest share of delta.
        """
        assert self.settings.strength is not None
        fitted = [self.settings.strength, *self.posterior.prior.precisions.tolist()]
        place = list(map(_nearest, self.axes, fitted))
        self._descend(place)
        place[self.main] = len(self.axes[self.main]) - 1
        self._descend(place)
        if len(self.axes[0]) > 1:
            self._descend([_nearest(axis, 1.0) for axis in self.axes])
        assert self._best is not None
        return self._best

    def _descend(self, place: list[int]) -> None:
        """One step of one coordinate at a time, as long as that helps."""
        # The main precision first and the strength last: they cost least and most.
        order = sorted(range(len(place)), key=lambda i: (i == 0, i != self.main))
        moved = True
        while moved:
            moved = False
            for i, step in product(order, (-1, 1)):
                while self._at(after := _stepped(place, i, step)) < self._at(place):
                    place, moved = after, True

    def prior_at(self, place: Sequence[int]) -> WeightPrior:
        """The operator there."""
        strength, *precisions = map(operator.getitem, self.axes, place)
        like = self.posterior.prior.precisions
        return self._built(strength).with_precisions(like.new_tensor(precisions))

    def _at(self, place: Sequence[int]) -> float:
        """The bound there; infinite off the grid."""
        key = tuple(place)
        if not all(0 <= k < len(axis) for k, axis in zip(key, self.axes, strict=True)):
            return math.inf
        if key not in self._bounds:
            strength, *precisions = map(operator.getitem, self.axes, key)
            main = precisions[self.main - 1]
            prior = self._outputs(strength, tuple(main / alpha for alpha in precisions))
            found = smallest_bound(
                prior.over(main),
                self.posterior.likelihood,
                self.data.targets,
                self.loss,
                self.share(key),
                self._draws,
            )
            self._bounds[key] = found.bound
            if self._best is None or found.bound < self._best[0].bound:
                self._best = found, key
        return self._bounds[key]

    def _built(self, strength: float) -> WeightPrior:
        if strength not in self._priors:
            settings = replace(self.settings, strength=strength)
            self._priors[strength] = settings.build(self.data.tangent, no_probes)
        return self._priors[strength]

    def _outputs(self, strength: float, scales: tuple[float, ...]) -> OutputPrior:
        """At main precision one; the last is kept, eigenvectors are what takes time."""
        key = strength, scales
        if self._last is None or self._last[0] != key:
            self._last = None
            kernels = self.data.kernels(self._built(strength))
            gram = torch.tensordot(kernels.new_tensor(scales), kernels, 1)
            assert self.data.offset is not None
            self._last = key, OutputPrior.of(self.data.offset, gram)
        return self._last[1]


def _data_free(posterior: LinearisedPosterior) -> LearnedPrior:
    """The prior that was fitted with, if the target's examples have not chosen it.

    Raises:
        ValueError: They have, or may have.
    """
    settings = posterior.settings
    if not isinstance(settings, LearnedPrior):
        what = (
            "one from a file, or a copy"
            if settings is None
            else f"one with {settings!r}"
        )
        raise ValueError(
            "posterior: expected one fitted in this process with prior=LearnedPrior, "
            "of which it is known that the examples have neither trained its weights "
            f"nor set its scales, found {what}; about a network's own weights it is "
            "LearnedPrior.from_data(..., strength=0) of the data that trained it"
        )
    if not settings.is_about(posterior.tangent):
        raise ValueError(
            "posterior: the network's weights are not those of the prior's source (or "
            "its frozen ones and statistics, or it is not known what the prior has "
            "seen), so the examples may have trained them; linearise the source's "
            "network"
        )
    return settings


def _tolerance(
    posterior: LinearisedPosterior,
    settings: LearnedPrior,
    loss: Loss | None,
    tolerance: float | Sequence[float] | Tensor | None,
) -> float | tuple[float, ...] | None:
    """What a regression may be off by, None for other losses.

    Raises:
        TypeError: It is no number, or the loss no function.
        ValueError: There is none that was chosen without the examples.
    """
    likelihood = posterior.likelihood
    if loss is not None and not callable(loss):
        raise TypeError(f"loss: expected a function or None, found {loss!r}")
    if loss is not None or not isinstance(likelihood, Gaussian):
        if tolerance is not None:
            raise ValueError(
                "tolerance: it is of the loss of a regression, and there is another"
            )
        return None
    if tolerance is not None:
        try:
            found = torch.as_tensor(tolerance, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError) as error:
            raise TypeError(
                "tolerance: expected a positive number, or one for each output, found "
                f"{tolerance!r}"
            ) from error
        if isinstance(tolerance, bool):
            raise TypeError(f"tolerance: expected a number, found {tolerance}")
        if found.ndim > 1 or not bool((torch.isfinite(found) & (found > 0)).all()):
            raise ValueError(
                "tolerance: expected a positive number, or one for each output, found "
                f"{tolerance}"
            )
        return tuple(found.tolist()) if found.ndim else float(found)
    if likelihood.learns_noise:
        raise ValueError(
            "tolerance: the likelihood's noise was learned from the target's examples; "
            "give a tolerance chosen without them, or the likelihood the source's "
            "noise, Gaussian(noise=prior.noise)"
        )
    noise = settings.noise
    if noise is None:
        raise ValueError(
            "tolerance: the prior's source was no regression and had no noise; say "
            "what a prediction may be off by"
        )
    if isinstance(noise, tuple):
        return tuple(_DEVIATIONS * math.sqrt(each) for each in noise)
    return _DEVIATIONS * math.sqrt(noise)


def _bounded_loss(
    posterior: LinearisedPosterior,
    data: TangentData,
    loss: Loss | None,
    limit: float | tuple[float, ...] | None,
) -> BoundedLoss:
    """The loss, tried on the prior's mean.

    Raises:
        ValueError: The likelihood has none in [0, 1], or the user's is none.
    """
    likelihood, outputs = posterior.likelihood, data.network_outputs
    if loss is not None:
        found = BoundedLoss(getattr(loss, "__name__", "loss"), loss)
    elif isinstance(likelihood, Categorical):
        classes = likelihood.classes or outputs.shape[1]
        found = error_rate(likelihood, classes)
    elif isinstance(likelihood, Bernoulli):
        found = label_error()
    elif limit is not None:
        tolerance = torch.tensor(limit, dtype=torch.float64, device=outputs.device)
        if tolerance.ndim and len(tolerance) != outputs.shape[1]:
            raise ValueError(
                f"tolerance: expected one number or {outputs.shape[1]}, one for each "
                f"output, found {len(tolerance)}"
            )
        found = out_of_tolerance(tolerance)
    else:
        raise ValueError(
            f"loss: {type(likelihood).__name__} has an unbounded loss only; give one "
            "in [0, 1]"
        )
    found(outputs.double().unsqueeze(-1), data.targets)
    return found


def _check_size(data: TangentData, prior: WeightPrior) -> None:
    """Refuse what has no exact divergence in memory.

    Raises:
        ValueError: Says how many examples have.
    """
    rows = data.network_outputs.numel()
    tangent, tables = data.tangent, _TABLES + 3 * prior.num_groups
    budget = resolve_budget(tangent.memory_budget, tangent.device)
    example = 16 * data.network_outputs.shape[1] * tangent.num_weights
    if example > budget:
        raise ValueError(
            f"posterior: the Jacobian of an example takes {example / 2**30:.1f} GiB, "
            f"expected at most {budget / 2**30:.1f} GiB (memory_budget); certify fewer "
            "weights (weights=...)"
        )
    most = math.isqrt(budget // (8 * tables))
    if rows > most:
        outputs = data.network_outputs.shape[1]
        raise ValueError(
            f"loader: {len(data.network_outputs)} examples with {outputs} outputs need "
            f"{8 * tables * rows**2 / 2**30:.1f} GiB for an exact divergence; at most "
            f"{most // outputs} examples fit (memory_budget)"
        )


def _assumptions(
    settings: LearnedPrior,
    search: _Search,
    n: int,
    repeated: int,
    limit: float | tuple[float, ...] | None,
) -> tuple[str, ...]:
    found = [
        f"the {n} examples are independent draws of what the bound is about; none was "
        "held out, all have chosen Q",
        "none of them trained the network, chose among networks or was seen by the "
        f"prior ({settings.num_examples} examples; inputs compared by hashes, none in "
        "common)",
    ]
    if repeated:
        found.append(
            f"{repeated} examples, which have the inputs of others, were drawn anew "
            "and not copied"
        )
    if settings.new or settings.grown:
        names = ", ".join((*settings.new, *settings.grown))
        found.append(
            f"what is new in the network ({names}) was initialised without them"
        )
    if settings.tried:
        found.append(
            f"delta is shared by {search.num_priors} priors: {len(search.axes[0])} "
            "strengths and their precisions"
        )
    else:
        found.append(
            f"the strength {settings.strength:.3g} was chosen without them; delta is "
            f"shared by {search.num_priors} precisions"
        )
    word = (
        "loss"
        if limit is None
        else f"tolerance {limit:.4g}"
        if isinstance(limit, float)
        else "tolerances"
    )
    found.append(f"the {word} was chosen without them")
    found.append("weights are drawn from Q for each prediction, and not averaged")
    return tuple(found)


def _in_weights(
    posterior: LinearisedPosterior,
    data: TangentData,
    prior: WeightPrior,
    found: OutputPosterior,
    count: int,
    seed: int,
) -> LinearisedPosterior:
    """Q over all weights: the prior, moved in the directions that the examples see."""
    outputs = found.prior
    rounding = torch.finfo(torch.float64).eps * len(outputs.values)
    seen = outputs.values > rounding * outputs.values.max()
    inverse = torch.where(seen, outputs.values, torch.inf).rsqrt()
    back = outputs.vectors * inverse

    def pulled(t: Float[Tensor, "r k"]) -> Float[Tensor, "D k"]:
        """A^T U diag(l)^-1/2 t."""
        images = (back @ t).view(*outputs.offset.shape, -1).to(data.network_outputs)
        return prior.root_adjoint(data.adjoint(lambda b, _: images[b.rows], t.shape[1]))

    generator = derived_generator(seed, "weights of a certificate")
    like = data.zeros(1)
    samples = standard_normal(count, len(like), like=like, generator=generator).mT
    budget = resolve_budget(data.tangent.memory_budget, samples.device)
    size = len(like) * samples.dtype.itemsize
    for v in samples.split(max(1, budget // (_LIVE_COLUMNS * size)), 1):
        images = data.forward(prior.root(v)).double().flatten(0, 1)
        moved = (found.variance.sqrt() - 1).unsqueeze(1) * (back.mT @ images)
        v.copy_(prior.root(v + pulled(moved)))
    return replace(
        posterior,
        prior=prior,
        weight_samples=samples,
        weight_mean=prior.root(pulled(found.mean.unsqueeze(1))),
        num_examples=data.stream.num_examples,
        mean_of="linear",
        history=(),
        warnings=(),
        scale=1.0,
        stream=data.stream,
    )


def _nearest(grid: Sequence[float], value: float) -> int:
    """Of numbers that may be zero, by their logarithms."""
    tiny = 1e-300
    logs = [abs(math.log((each + tiny) / (value + tiny))) for each in grid]
    return logs.index(min(logs))


def _stepped(place: Sequence[int], i: int, step: int) -> list[int]:
    return [k + step * (j == i) for j, k in enumerate(place)]
