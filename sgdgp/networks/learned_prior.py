"""What one task taught, as the prior of the next: N(mean, P^-1) over the weights.

At the weights theta that a source task was trained to, its loss has the curvature F,
kept as Kronecker factors of each layer, and

    P = alpha (B + tau F),

with B the precision from before (the identity, or that of the source's own prior), a
strength tau that says how much of the source holds for the target, and alpha that
learning sets as ever. The target's model is linear in the weights about theta,
f(x, theta) + J(x) (c + w), w ~ N(0, P^-1), c the prior's mean minus theta: the mean of
the source's posterior counts as much as its precision. (In a linear model with all of
the source's curvature the target's posterior is that of both data sets together.)

A model that is linear about weights trained on the target is one that the data have
chosen; about those of the source it is a Gaussian process that has not seen them.

Tasks one after another add up, F + F_2 + ..., compressed to one Kronecker product a
layer, means carried, so that memory does not grow (Schnaus, Lee, Cremers and Triebel,
"Learning expressive priors for generalization and uncertainty estimation in neural
networks", ICML 2023). Compressing the identity with them would move small eigenvalues
by orders of magnitude: B is never part of the product here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from itertools import zip_longest
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sgdgp.core.checks import check_finite, check_number
from sgdgp.core.codec import (
    encode,
    fitting,
    read_values,
    register_stored_class,
    write_values,
)
from sgdgp.core.files import FileKind, path_of, place_of, reads
from sgdgp.core.hashes import digest
from sgdgp.networks.curvature import TangentData
from sgdgp.networks.fitting import first_noise
from sgdgp.networks.kronecker_curvature import kronecker_curvature
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.posterior import LinearisedPosterior
from sgdgp.networks.priors import (
    Block,
    DiagonalPrior,
    KroneckerPrior,
    KroneckerSum,
    MatrixRoot,
    PriorSettings,
    WeightPrior,
    precision_sum,
)
from sgdgp.networks.priors.base import Probes, grouped
from sgdgp.networks.stream import Split, Stream, example_hashes, stream_of
from sgdgp.tangent import Tangent, Weights

KIND = FileKind("sgdgp.networks.prior", 1, "learned prior")

STRENGTHS = (0.0, 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
"""Of the curvature over the inverse of its mean eigenvalue: from the prior that knows
the source's weights alone to one in which all but the flattest directions are held;
float32 has no digits for more. Powers of ten, as the evidence is flat in it, and alpha
is learned for each. What the target's examples do not see, such as inputs that only the
source has, has no evidence at all: so that the largest strength is taken against which
there is none."""


@register_stored_class
@dataclass(frozen=True, eq=False, repr=False)
class LearnedPrior(PriorSettings):
    """The prior that ``from_data``, ``of`` or a file gives; not to be made by hand.

    Attributes:
        names: Of the weights' tensors.
        shapes: Of each.
        mean: Where the prior is (D,).
        base: B.
        curvature: F, a block for each tensor.
        strength: tau. None: the largest of ``candidates`` that the evidence allows.
        num_examples: Examples that it was learned from.
        seen: Hashes of their inputs (n,), by which ``certify`` knows them.
        noise: Noise variance of the source, if it was a regression.
        new: Patterns of tensors that a target has in place of the source's.
        grown: Patterns of those that have more rows there.
        tried: Strengths that ``strength`` was chosen from by a target's evidence.
        about: Hashes of the network about which its tasks were linear, of each tensor:
            weights, those that are no part of the prior, and buffers.
    """

    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    mean: Float[Tensor, " D"]
    base: WeightPrior
    curvature: KroneckerPrior
    strength: float | None
    num_examples: int
    seen: Int[Tensor, " n"]
    noise: float | tuple[float, ...] | None = None
    new: Sequence[str] = ()
    grown: Sequence[str] = ()
    tried: Sequence[float] = ()
    about: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.mean) != sum(map(_size, self.shapes)):
            raise ValueError(
                f"mean: expected {sum(map(_size, self.shapes))} weights, found "
                f"{len(self.mean)}"
            )
        if self.strength is None:
            return
        check_number("strength", self.strength)
        if not 0 <= self.strength < float("inf"):
            raise ValueError(
                f"strength: expected a number of at least 0, found {self.strength}"
            )

    def __repr__(self) -> str:
        """What it is about, not its tensors."""
        strength = "" if self.strength is None else f", strength {self.strength:.3g}"
        return (
            f"LearnedPrior({len(self.mean)} weights in {len(self.names)} tensors, "
            f"from {self.num_examples} examples{strength})"
        )

    @classmethod
    def from_data(
        cls,
        network: nn.Module,
        likelihood: Likelihood,
        loader: Any,
        *,
        weights: Weights = None,
        output: Callable[[Any], Tensor] | None = None,
        split: Split | None = None,
        strength: float | None = None,
        memory_budget: int | None = None,
    ) -> LearnedPrior:
        """Of a network and the data that trained it, in four passes over them.

        In a group of processes (torchrun) all of them call this; they get the same.

        Args:
            network: Trained, in evaluation mode.
            likelihood: Of the source's targets.
            loader: The source's data, as ``fit`` takes them.
            weights: As in ``linearise``.
            output: As in ``linearise``.
            split: From what the loader yields to (inputs, targets).
            strength: tau, 1 if the target's examples are as good as the source's.
                Default: chosen by each target's evidence.
            memory_budget: Bytes for temporaries. Default: half of what is free.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: The data do not fit, or a layer has no Kronecker factors.
        """
        if not isinstance(likelihood, Likelihood):
            raise TypeError(
                "likelihood: expected Categorical(), Bernoulli() or Gaussian(), found "
                f"{type(likelihood).__name__}"
            )
        tangent = Tangent(
            network, weights=weights, output=output, memory_budget=memory_budget
        )
        stream = stream_of(loader, tangent.device, split)
        data = TangentData(tangent, stream, likelihood)
        outputs = data.network_outputs
        likelihood.check_targets(data.targets, outputs.shape[1])
        likelihood = likelihood.with_targets(data.targets, outputs.shape[1])
        if isinstance(likelihood, Gaussian) and likelihood.learns_noise:
            likelihood = first_noise(data, likelihood, outputs)
        ones = torch.ones(1, dtype=tangent.dtype, device=tangent.device)
        return cls(
            names=tangent.names,
            shapes=[tuple(shape) for shape in tangent.shapes],
            mean=tangent.theta[:, 0].clone(),
            base=DiagonalPrior(tangent.num_weights, ones),
            curvature=kronecker_curvature(data, likelihood, outputs),
            strength=strength,
            num_examples=stream.num_examples,
            seen=example_hashes(stream),
            noise=likelihood.variance,
            about=_hashes(tangent),
        )

    @classmethod
    def of(
        cls,
        posterior: LinearisedPosterior,
        loader: Any = None,
        *,
        split: Split | None = None,
    ) -> LearnedPrior:
        """The posterior of the source as it is: its prior's precision and its data's.

        With a source prior of one variance (``Isotropic()``) products with the root
        are in closed form. Beside a diagonal that varies within a matrix, as that of
        the default ``GPrior()``, they take conjugate gradients for each large matrix:
        a hundred times as long. In a group of processes all of them call this.

        Args:
            posterior: Of the source; its mean is that of the prior. The ``scale`` that
                ``calibrate`` has set does not enter.
            loader: The data that it was fitted to. Default: it still knows them, unless
                it comes from a file.
            split: As in ``from_data``.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: There are no data, or a layer has no Kronecker factors.
        """
        _check_posterior(posterior)
        tangent = posterior.tangent
        stream = _stream_of(posterior, loader, split)
        seen, before = _seen_by(posterior, stream)
        # A file does not say what the prior of its posterior has seen; a centre may
        # be that of a learned prior, or an offset's.
        is_free = posterior.centre is None or posterior.settings is not None
        is_known = is_free if before is None else bool(before.about)
        return cls(
            names=tangent.names,
            shapes=[tuple(shape) for shape in tangent.shapes],
            mean=_mean_of(posterior),
            base=posterior.prior.folded(),
            curvature=_curvature_of(posterior, stream),
            strength=1.0,
            num_examples=stream.num_examples
            + (0 if before is None else before.num_examples),
            seen=seen,
            noise=posterior.noise,
            about=_hashes(tangent) if is_known else {},
        )

    def updated(
        self,
        posterior: LinearisedPosterior,
        loader: Any = None,
        *,
        compress: bool = True,
        split: Split | None = None,
    ) -> LearnedPrior:
        """What is known after another task: the prior of the one that follows.

        Its precision is this one's, at the strength and alpha that the posterior was
        fitted with, and the curvature of its data; its mean is the posterior's. Fitted
        with ``precision=1.0, steps=0`` all tasks count alike. In a group of processes
        all of them call this.

        Args:
            posterior: Fitted with this prior.
            loader: The data that it was fitted to. Default: it still knows them.
            compress: The best single Kronecker product a layer in place of a term for
                each task, so that memory does not grow.
            split: As in ``from_data``.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: The posterior is none of this prior, or there are no data.
        """
        _check_posterior(posterior)
        fitted = posterior.settings
        if not isinstance(fitted, LearnedPrior) or not self._is_same(fitted):
            what = (
                "one from a file, a pickle or a copy"
                if fitted is None
                else f"one with {fitted!r}, which has another mean or saw other data"
            )
            raise ValueError(
                "posterior: expected one that was fitted with this prior in this "
                f"process, found {what}"
            )
        tangent = posterior.tangent
        stream = _stream_of(posterior, loader, split)
        fresh = _curvature_of(posterior, stream)
        alphas = [alpha for _, alpha in posterior.prior.pieces()]
        bases, curvatures = [], []
        for (before, old), now, alpha in zip(
            fitted._blocks(tangent), fresh.blocks, alphas, strict=True
        ):
            assert isinstance(now, KroneckerSum)
            base, total = before.scaled(alpha), now
            if base.shape != now.shape:
                variances = base.variances().view(now.shape)
                base = KroneckerSum((), variances.reciprocal())
            bases.append(base)
            if old is not None and fitted.strength:
                total = old.scaled(alpha * fitted.strength).plus(now)
            curvatures.append(total.compressed() if compress else total)
        size, ones = tangent.num_weights, torch.ones_like(fresh.precisions)
        return LearnedPrior(
            names=tangent.names,
            shapes=[tuple(shape) for shape in tangent.shapes],
            mean=_mean_of(posterior),
            base=KroneckerPrior(size, ones, blocks=bases),
            curvature=KroneckerPrior(size, ones, blocks=curvatures),
            strength=1.0,
            num_examples=fitted.num_examples + stream.num_examples,
            seen=_seen_by(posterior, stream)[0],
            noise=posterior.noise,
            about=_hashes(tangent) if fitted.about else {},
        )

    def plus(self, other: LearnedPrior) -> LearnedPrior:
        """With the curvature of another task, or of other classes, at the same weights.

        Args:
            other: Of the same network, from ``from_data``, with the same strength.

        Raises:
            TypeError: It is no learned prior.
            ValueError: It is of another, or of other weights; names the first tensor.
                Or it has another strength, or knows tasks before its own.
        """
        if not isinstance(other, LearnedPrior):
            raise TypeError(
                f"other: expected a LearnedPrior, found {type(other).__name__}"
            )
        nothing = ("", self.mean[:0])
        for (mine, here), (its, there) in zip_longest(
            self._means(), other._means(), fillvalue=nothing
        ):
            if mine != its or not torch.equal(here, there.to(here)):
                name = mine or its
                raise ValueError(
                    f"other: expected a prior about the same weights, found {name!r} "
                    "that differs"
                )
        if self.strength != other.strength:
            raise ValueError(
                f"other: expected one of strength {self.strength}, found "
                f"{other.strength}"
            )
        if not isinstance(other.base, DiagonalPrior) or other.base.scales is not None:
            raise ValueError(
                "other: expected one of LearnedPrior.from_data, found one that has "
                "seen tasks before its own, which would be lost; add to that one"
            )
        return replace(
            self,
            about=self.about if self.about == other.about else {},
            curvature=precision_sum(self.curvature, other.curvature),
            num_examples=self.num_examples + other.num_examples,
            seen=torch.cat([self.seen, other.seen.to(self.seen)]).unique(),
        )

    def compressed(self) -> LearnedPrior:
        """The best single Kronecker product for each layer, in place of several."""
        return replace(self, curvature=self.curvature.compressed())

    def extended(
        self, *, new: str | Sequence[str] = (), grown: str | Sequence[str] = ()
    ) -> LearnedPrior:
        """The same for a target whose network has other heads.

        Args:
            new: Patterns (``fnmatch``) of tensors that the prior does not know, or no
                longer, such as ``"head.*"``: they are independent, about what the
                network has there, with a precision of their own to learn.
            grown: Patterns of tensors that may have more rows than in the source, which
                are such weights; outputs of classes that arrive later.

        Raises:
            TypeError: A pattern is no string.
        """
        new, grown = _patterns("new", new), _patterns("grown", grown)
        return replace(self, new=(*self.new, *new), grown=(*self.grown, *grown))

    def candidates(self) -> Sequence[LearnedPrior]:
        """This prior at each strength that comes into question."""
        if self.strength is not None:
            return (self,)
        if all(_any(self.new, name) for name in self.names):
            return (replace(self, strength=0.0),)
        mean = self._mean_curvature()
        tried = [strength / mean for strength in STRENGTHS]
        return [replace(self, strength=strength, tried=tried) for strength in tried]

    def centre(self, tangent: Tangent) -> Float[Tensor, "D 1"]:
        """The prior's mean minus the network's weights; none of it for what is new."""
        check_finite("prior", self.mean)
        found = torch.zeros_like(tangent.theta)
        parts = [known.flatten().to(found) for _, known in self._means()]
        for place, s in zip(
            self._places(tangent), tangent.slices.values(), strict=True
        ):
            if place is not None:
                known = parts[place]
                to = slice(s.start, s.start + len(known))
                found[to, 0] = known - tangent.theta[to, 0]
        return found

    def is_about(self, tangent: Tangent) -> bool:
        """Whether a network is that of the source, about which it may be linear.

        Its weights are the prior's mean, or those about which the tasks before were
        linear; what is constant in it, such as statistics of batch norms, is as it was.
        """
        moved = self.centre(tangent)[:, 0]
        places = self._places(tangent)
        for name, place, s in zip(
            tangent.names, places, tangent.slices.values(), strict=True
        ):
            if place is not None and bool(moved[s].any()):
                known = tangent.theta[s, 0][: _size(self.shapes[place])]
                if self.about.get(name) != _hash(known):
                    return False
        return bool(self.about) and all(
            self.about.get(name) == _hash(value) or _any((*self.new, *self.grown), name)
            for name, value in _constants(tangent)
        )

    def build(self, tangent: Tangent, probes: Probes) -> KroneckerPrior:
        """P, with a precision alpha for what the source knows and one for what is new.

        Raises:
            ValueError: The network is another one; names the first tensor that differs.
        """
        strength = 1.0 if self.strength is None else self.strength
        blocks: list[Block] = [
            base
            if curvature is None or not strength
            else base.as_sum().plus(curvature.scaled(strength))
            for base, curvature in self._blocks(tangent)
        ]
        return KroneckerPrior(
            *grouped(tangent, lambda name: "new" if _any(self.new, name) else ""),
            blocks=blocks,
        )

    def identity(self) -> str:
        tensors: dict[str, Tensor] = {}
        state = encode(self, "prior", tensors)
        parts = [digest(tensor) for tensor in tensors.values()]
        return f"{self!r} {digest((state, parts))}"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the prior to a file, its mean included; ``LearnedPrior.load`` reads it.

        Raises:
            StorageError: Nothing can be written there.
            TypeError: ``path`` is no path.
            OSError: The disk is full; an old file is untouched.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_values(place_of(path), KIND, values)

    @staticmethod
    def load(
        path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> LearnedPrior:
        """Read a prior that was saved.

        Args:
            path: The file.
            device: Where it is to be; ``linearise`` takes it to the network's anyway.

        Raises:
            StorageError: The file is missing, damaged, of another kind or of a newer
                format.
            TypeError: An argument is of the wrong kind.
        """
        return load_prior(path, device)

    def _means(self) -> list[tuple[str, Tensor]]:
        """Each tensor's name, and its mean in its shape."""
        parts = self.mean.split([_size(shape) for shape in self.shapes])
        return [
            (name, part.view(tuple(shape)))
            for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        ]

    def _is_same(self, other: LearnedPrior) -> bool:
        """Whether it is this one, or another reading of its file."""
        if other.mean is self.mean:
            return True
        pairs = (self.mean, other.mean), (self.seen, other.seen)
        return all(torch.equal(a, b.to(a.device)) for a, b in pairs)

    def _blocks(self, tangent: Tangent) -> Iterator[tuple[Block, KroneckerSum | None]]:
        """Blocks of B and of F for each tensor of a network, F none for a new one."""
        shapes = self.curvature.shapes
        bases = [b.scaled(a) for b, a in self.base.pieces_of(shapes)]
        level = float(sum(1 / b.variances().mean() for b in bases)) / len(bases)
        for place, shape in zip(self._places(tangent), tangent.shapes, strict=True):
            like = tangent.theta
            if place is None:
                ones = like.new_ones(shape.numel())
                yield MatrixRoot.independent(ones / level**0.5), None
                continue
            base, curvature = bases[place].to(like), self.curvature.blocks[place]
            assert isinstance(curvature, KroneckerSum)
            curvature = curvature.to(like)
            if shape.numel() != curvature.num_weights:
                out = shape.numel() // curvature.shape[1]
                own = base.as_sum()
                # Where P is a number beside its terms, it stays one.
                least, most = torch.as_tensor(own.diagonal).aminmax()
                is_number = bool((least == most) & (most > 0))
                base = own.grown(out, float(most) if is_number else level)
                curvature = curvature.grown(out, 0.0)
            yield base, curvature

    def _places(self, tangent: Tangent) -> list[int | None]:
        """Which of the prior's tensors each of a network's is, None where it is new.

        Raises:
            ValueError: The network is another one; names the first tensor that differs.
        """
        numbers = {name: i for i, name in enumerate(self.names)}
        found: list[int | None] = []
        for name, shape in zip(tangent.names, tangent.shapes, strict=True):
            place = None if _any(self.new, name) else numbers.get(name)
            if place is None and not _any(self.new, name):
                raise ValueError(
                    f"prior: learned for another network, without weights {name!r} of "
                    f"shape {tuple(shape)}; if they are meant to be new, "
                    f"prior.extended(new={name!r})"
                )
            there = None if place is None else tuple(self.shapes[place])
            if there is not None and tuple(shape) != there:
                more = shape[1:] == torch.Size(there[1:]) and shape[:1] > there[:1]
                if not (more and _any(self.grown, name)):
                    argument = "grown" if more else "new"
                    raise ValueError(
                        f"prior: learned for another network, whose weights {name!r} "
                        f"have shape {there}, here {tuple(shape)}; if that is meant to "
                        f"be, prior.extended({argument}={name!r})"
                    )
            found.append(place)
        for name in self.names:
            if name not in tangent.names and not _any(self.new, name):
                raise ValueError(
                    f"prior: learned for another network, which has weights {name!r}; "
                    f"if they are meant to be left out, prior.extended(new={name!r})"
                )
        return found

    def _mean_curvature(self) -> float:
        """The mean eigenvalue of F, of what is known.

        Raises:
            ValueError: F is zero or not finite.
        """
        known = [
            block
            for name, block in zip(self.names, self.curvature.blocks, strict=True)
            if isinstance(block, KroneckerSum) and not _any(self.new, name)
        ]
        total = torch.tensor([block.trace() for block in known], device="cpu").double()
        check_finite("curvature", total)
        if not float(total.sum()) > 0:
            raise ValueError(
                "prior: the source's curvature is zero, so it taught nothing; "
                "strength=0 is the prior that knows its weights alone"
            )
        return float(total.sum()) / sum(block.num_weights for block in known)


@reads(KIND)
def load_prior(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> LearnedPrior:
    """``LearnedPrior.load``, which says all."""
    place = path_of(path)
    if not isinstance(device, str | torch.device):
        raise TypeError(
            f"device: expected one for {place}, a learned prior, found {device!r}"
        )
    found = read_values(place, KIND)
    found.device = torch.device(device)
    with fitting(place, "prior"):
        return LearnedPrior(**{f.name: found[f.name] for f in fields(LearnedPrior)})


def _hashes(tangent: Tangent) -> dict[str, str]:
    weights = tangent.theta[:, 0]
    found = {name: _hash(weights[s]) for name, s in tangent.slices.items()}
    return found | {name: _hash(value) for name, value in _constants(tangent)}


def _constants(tangent: Tangent) -> Iterator[tuple[str, Tensor]]:
    """What data may have trained in a network beside the weights, by name."""
    for name, value in tangent.network.state_dict().items():
        is_number = isinstance(value, Tensor) and value.is_floating_point()
        if is_number and name not in tangent.slices:
            yield name, value


def _hash(value: Tensor) -> str:
    """The same in every dtype that has the numbers."""
    return digest(value.flatten().float())


def _patterns(argument: str, value: str | Sequence[str]) -> tuple[str, ...]:
    """One or several.

    Raises:
        TypeError: Neither.
    """
    found = (value,) if isinstance(value, str) else value
    if not isinstance(found, Sequence) or not all(isinstance(p, str) for p in found):
        raise TypeError(
            f"{argument}: expected a pattern of names such as 'head.*', or several, "
            f"found {value!r}"
        )
    return tuple(found)


def _check_posterior(posterior: LinearisedPosterior) -> None:
    if not isinstance(posterior, LinearisedPosterior):
        raise TypeError(
            "posterior: expected what linearise(...).fit(...) returns, found "
            f"{type(posterior).__name__}"
        )


def _any(patterns: Sequence[str], name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _size(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()


def _stream_of(
    posterior: LinearisedPosterior, loader: Any, split: Split | None
) -> Stream:
    if loader is not None:
        found = stream_of(loader, posterior.tangent.device, split)
        count = found.num_examples
        if posterior.stream is None and count != posterior.num_examples:
            raise ValueError(
                "loader: expected the data that the posterior was fitted to, "
                f"{posterior.num_examples} examples, found {count}"
            )
        return found
    if posterior.stream is None:
        raise ValueError(
            "loader: a posterior from a file, a pickle or a copy does not know its "
            "training data; give them"
        )
    return posterior.stream


def _seen_by(
    posterior: LinearisedPosterior, stream: Stream
) -> tuple[Int[Tensor, " n"], LearnedPrior | None]:
    """All that has made a posterior: hashes, and the prior that knew some of them.

    Args:
        posterior: Fitted to its own data.
        stream: Those that are said to be them.
    """
    settings, own = posterior.settings, posterior.stream
    found = [example_hashes(stream)]
    if own is not None and own is not stream:
        found.append(example_hashes(own).to(stream.device))
    before = settings if isinstance(settings, LearnedPrior) else None
    if before is not None:
        found.append(before.seen.to(stream.device))
    return torch.cat(found).unique(), before


def _mean_of(posterior: LinearisedPosterior) -> Float[Tensor, " D"]:
    """The posterior's mean in weights, about which the network is linear.

    Without a centre the model has no offset, and its optimum is no change of the
    network's weights: these are the mean.
    """
    theta = posterior.tangent.theta[:, 0]
    if posterior.centre is None or posterior.mean_of == "network":
        return theta.clone()
    return theta + (posterior.centre + posterior.weight_mean)[:, 0]


def _curvature_of(posterior: LinearisedPosterior, stream: Stream) -> KroneckerPrior:
    """F of the data at the outputs that the posterior's mean has."""
    data = TangentData(
        posterior.tangent, stream, posterior.likelihood, posterior.centre
    )
    outputs = data.network_outputs
    if posterior.centre is not None and posterior.mean_of == "linear":
        outputs = data.outputs_of(posterior.weight_mean)
    posterior.likelihood.check_targets(data.targets, outputs.shape[1])
    return kronecker_curvature(data, posterior.likelihood, outputs)
