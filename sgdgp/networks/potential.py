"""The negative log posterior of a network's weights, for many weight vectors at once.

    U(theta) = sum_n l(f(x_n, theta), y_n) + 1/2 (theta - m)^T P (theta - m),

a sum over the data, not a mean: exp(-U) is the posterior of all weights of the network
itself, up to a constant. Nothing is linearised and nothing Gaussian is assumed, so it
is what approximations of the posterior are held against: samplers follow its gradient,
and its optima under a little more of one output are variances (``hessian_free.py``).

Weight vectors are rows (k, D) in the order of the tangent's; a batch of data goes
through all k networks together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sgdgp.core.checks import check_positive
from sgdgp.core.memory import resolve_budget
from sgdgp.core.slices import slices
from sgdgp.networks.likelihoods import Likelihood
from sgdgp.networks.priors import Isotropic, WeightPrior
from sgdgp.networks.priors.base import no_probes
from sgdgp.networks.stream import KEPT_BYTES, Batch, Split, Stream, stream_of
from sgdgp.tangent import Tangent, Weights

LossFunction: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From outputs (b, C) and targets to one number, the sum over the examples."""

_Outputs: TypeAlias = Callable[[dict[str, Tensor]], Tensor]

_JOINED_BYTES = 2**27
"""Batches are joined until one network's graph of them takes 128 MiB: small networks
meet all their data in one call, whose overhead would be most of their time."""


@runtime_checkable
class Fitted(Protocol):
    """What a ``LinearisedPosterior`` knows of how it came about."""

    tangent: Tangent
    likelihood: Likelihood
    prior: WeightPrior
    num_examples: int
    centre: Tensor | None
    stream: Stream | None


@dataclass(frozen=True, eq=False)
class Potential:
    """U(theta) of a network, its data and a Gaussian prior; see the module's text.

    Attributes:
        tangent: The network as a function of its weights; its own are ``theta``.
        stream: The training data.
        likelihood: Of the targets, with a noise if it has one; or a loss function that
            sums over the examples.
        prior: N(m, P^-1) of the weights.
        mean: m (D,). Default: zero.

    Raises:
        TypeError: The loss is neither a likelihood nor a function.
        ValueError: The loss is a mean over the examples, or no finite number for each
            batch; the likelihood's noise is unknown; targets do not fit; or the prior
            is one of other weights.
    """

    tangent: Tangent
    stream: Stream
    likelihood: Likelihood | LossFunction
    prior: WeightPrior
    mean: Float[Tensor, " D"] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prior, WeightPrior):
            raise TypeError(
                "prior: expected a Gaussian such as DiagonalPrior or KroneckerPrior, "
                f"found {type(self.prior).__name__}; settings become one in a fit "
                "(Potential.of(posterior)), and Isotropic() is precision="
            )
        self.prior.build(self.tangent, no_probes)
        size = (self.tangent.num_weights,)
        if self.mean is not None and self.mean.shape != size:
            raise ValueError(
                f"mean: expected shape {size}, found {tuple(self.mean.shape)}"
            )
        batch = next(iter(self.stream), None)
        if batch is None:
            return  # a process that has no examples
        outputs = self.tangent.outputs(batch.x)
        if isinstance(self.likelihood, Likelihood):
            _ = self.likelihood.variance  # refuses a noise that is not known
            self.likelihood.check_targets(batch.y, outputs.shape[1])
            placed = self.likelihood.with_targets(batch.y, outputs.shape[1])
            object.__setattr__(self, "likelihood", placed)
        elif callable(self.likelihood) and not isinstance(self.likelihood, type):
            _check_sum(self.likelihood, outputs, batch.y)
        else:
            raise TypeError(
                "likelihood: expected Categorical(), Bernoulli(), Gaussian() or a loss "
                f"function, found {self.likelihood!r}"
            )

    @classmethod
    def of(
        cls,
        posterior: Fitted,
        loader: Any = None,
        *,
        split: Split | None = None,
    ) -> Potential:
        """That of the network, data, noise and prior of a linearised posterior.

        Args:
            posterior: A ``LinearisedPosterior``.
            loader: Its training data, as ``fit`` takes them. Default: those it was
                fitted to, unless it comes from a file.
            split: From what the loader yields to (inputs, targets).

        Raises:
            ValueError: The data are not known, or not as many.
        """
        tangent = posterior.tangent
        if loader is None:
            if posterior.stream is None:
                raise ValueError(
                    "loader: a posterior from a file does not hold its training data; "
                    "make a potential of both, Potential.of(posterior, loader), which "
                    "hmc(potential) and HessianFree().variance(potential, x) take"
                )
            stream = posterior.stream
        else:
            stream = stream_of(loader, tangent.device, split)
        if stream.num_examples != posterior.num_examples:
            raise ValueError(
                f"loader: expected the {posterior.num_examples} examples that the "
                f"posterior was fitted to, found {stream.num_examples}"
            )
        centre = posterior.centre
        mean = None if centre is None else (tangent.theta + centre)[:, 0]
        return cls(tangent, stream, posterior.likelihood, posterior.prior, mean)

    @classmethod
    def from_network(
        cls,
        network: nn.Module,
        likelihood: Likelihood | LossFunction,
        loader: Any,
        *,
        precision: float = 1.0,
        prior: WeightPrior | None = None,
        weights: Weights = None,
        output: Callable[[Any], Tensor] | None = None,
        split: Split | None = None,
        memory_budget: int | None = None,
    ) -> Potential:
        """That of a network trained without any of this.

        Args:
            network: A trained network in evaluation mode.
            likelihood: Of the targets, or the loss it was trained with as a function
                of outputs (b, C) and targets that sums over the examples, such as
                ``torch.nn.CrossEntropyLoss(reduction="sum")``.
            loader: Its training data, see ``LinearisedNetwork.fit``.
            precision: Of a prior N(0, 1 / precision) over every weight: weight decay
                d on a mean cross-entropy over n examples is n d. A squared error says
                nothing of the noise: give ``Gaussian(noise=v)`` for it, and n d / (2 v)
                times the number of outputs.
            prior: Another prior about zero, in place of it.
            weights: Which weights are uncertain, see ``linearise``.
            output: Takes what the network returns to a tensor (b, ...).
            split: From what the loader yields to (inputs, targets).
            memory_budget: Bytes for temporaries. Default: half of what is free.

        Raises:
            TypeError: An argument is of the wrong kind.
            ValueError: One does not fit; says which and why.
        """
        check_positive("precision", precision)
        tangent = Tangent(
            network, weights=weights, output=output, memory_budget=memory_budget
        )
        if prior is None:
            prior = Isotropic().build(tangent, no_probes)
            prior = prior.with_precisions(precision * torch.ones_like(prior.precisions))
        elif precision != 1.0:
            raise ValueError("precision: a prior has its own, give one of the two")
        stream = stream_of(loader, tangent.device, split)
        return cls(tangent, stream, likelihood, prior)

    @property
    def num_weights(self) -> int:
        """D."""
        return self.tangent.num_weights

    @functools.cached_property
    def theta(self) -> Float[Tensor, " D"]:
        """The network's own weights."""
        return self.tangent.theta[:, 0]

    @torch.no_grad()
    def __call__(self, weights: Float[Tensor, "k D"]) -> Float[Tensor, " k"]:
        """U of each row; infinite or NaN where outputs overflow."""
        return self._evaluated(weights, with_slopes=False)[0]

    @torch.no_grad()
    def value_and_gradient(
        self, weights: Float[Tensor, "k D"], batch: Batch | None = None
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "k D"]]:
        """U and its gradient at each row, by one pass over the data.

        Args:
            weights: Rows.
            batch: One of a pass over the stream, that stands for all: the mean over a
                pass is exact, however uneven its batches are. Default: all.
        """
        return self._evaluated(weights, with_slopes=True, batch=batch)

    def outputs(self, weights: Float[Tensor, "k D"], x: Any) -> Float[Tensor, "k b C"]:
        """What networks with these weights say at x."""
        self._check(weights)
        return self.tangent.outputs_of(weights, x)

    def _evaluated(
        self, weights: Tensor, with_slopes: bool, batch: Batch | None = None
    ) -> tuple[Float[Tensor, " k"], Float[Tensor, "k D"]]:
        """U, by the data or a batch for all, and its gradient or the prior's alone."""
        self._check(weights)
        self.tangent.check_unchanged()
        losses, slopes = weights.new_zeros(len(weights)), torch.zeros_like(weights)
        data, share = self._data, 1.0
        if batch is not None:
            data = [self._at(batch)]
            share = float(self.stream.num_batches)
        for function, part in data:
            for some in slices(len(weights), self.networks_at_once(len(part.y))):
                leaf = weights[some].detach().requires_grad_(with_slopes)
                with torch.set_grad_enabled(with_slopes):
                    found = self._loss(self.tangent.batched(function, leaf), part.y)
                    if with_slopes:
                        slopes[some] += torch.autograd.grad(found.sum(), leaf)[0]
                losses[some] += found.detach()
        losses, slopes = losses * share, slopes * share
        self.stream.processes.sum_(losses, slopes)
        offsets = weights if self.mean is None else weights - self.mean
        pulled = self.prior.matmul(offsets.mT).mT
        return losses + 0.5 * (offsets * pulled).sum(1), slopes + pulled

    def _loss(self, outputs: Float[Tensor, "k b C"], y: Tensor) -> Float[Tensor, " k"]:
        if isinstance(self.likelihood, Likelihood):
            return -self.likelihood.log_prob(outputs.permute(1, 2, 0), y).sum(0)
        return torch.stack([self.likelihood(each, y) for each in outputs])

    @functools.cached_property
    def _num_outputs(self) -> int:
        return self.tangent.outputs(next(iter(self.stream)).x).shape[1]

    @functools.cached_property
    def _data(self) -> Iterable[tuple[_Outputs, Batch]]:
        """The batches with their networks, kept and joined where they are small."""
        kept: list[Batch] = []
        size = 0
        for batch in self.stream:
            size += sum(leaf.nbytes for leaf in _leaves((batch.x, batch.y)))
            if size > KEPT_BYTES:
                return _Passes(self)
            kept.append(batch)
        most = max(1, _JOINED_BYTES // self._bytes_of_example)
        joined = list(_joined(kept, most))
        return list(map(self._at, joined))

    def _at(self, batch: Batch) -> tuple[_Outputs, Batch]:
        """The network at a batch, whose targets are looked at."""
        if isinstance(self.likelihood, Likelihood):
            self.likelihood.check_targets(batch.y, self._num_outputs)
        return self.tangent.function(batch.x), batch

    @functools.cached_property
    @torch.no_grad()
    def _bytes_of_example(self) -> int:
        """Bytes that one network keeps of one example for its gradient."""
        batch = next(iter(self.stream))
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        function, theta = self.tangent.function(batch.x), self.theta[None]
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            tensors = self.tangent.weights_of(theta.clone().requires_grad_())
            outputs = function({name: t[0] for name, t in tensors.items()})
        own = self.num_weights * theta.itemsize
        return max(outputs[0].nbytes, (sum(kept.values()) - own) // len(outputs))

    def networks_at_once(self, examples: int) -> int:
        """Networks whose graphs at so many examples fit into the memory budget."""
        # As much again are the gradients on their way back.
        return max(1, self._budget // (2 * examples * self._bytes_of_example))

    @functools.cached_property
    def _budget(self) -> int:
        # Once: reading what is free takes as long as a pass of a small network.
        return resolve_budget(self.tangent.memory_budget, self.tangent.device)

    def _check(self, weights: Tensor) -> None:
        if weights.ndim != 2 or weights.shape[1] != self.num_weights:
            raise ValueError(
                f"weights: expected rows (k, {self.num_weights}), found "
                f"{tuple(weights.shape)}"
            )
        like = self.theta
        if weights.dtype != like.dtype or weights.device != like.device:
            raise ValueError(
                f"weights: expected {like.dtype} on {like.device} as the network's, "
                f"found {weights.dtype} on {weights.device}"
            )


@dataclass(frozen=True)
class _Passes:
    """A data set that does not fit into memory, read anew in every pass."""

    potential: Potential

    def __iter__(self) -> Iterator[tuple[_Outputs, Batch]]:
        return map(self.potential._at, self.potential.stream)


def _joined(batches: list[Batch], most: int) -> Iterator[Batch]:
    """Consecutive batches of plain tensors as one, of up to so many examples."""
    group: list[Batch] = []
    for batch in batches:
        held = sum(len(each.y) for each in group)
        is_alike = bool(group) and (
            isinstance(batch.x, Tensor)
            and batch.x.shape[1:] == group[-1].x.shape[1:]
            and batch.y.shape[1:] == group[-1].y.shape[1:]
        )
        if group and not (is_alike and held + len(batch.y) <= most):
            yield _one(group)
            group = []
        group.append(batch)
    if group:
        yield _one(group)


def _one(group: list[Batch]) -> Batch:
    if len(group) == 1:
        return group[0]
    parts = ((b.rows, b.examples, b.x, b.y) for b in group)
    return Batch(*map(torch.cat, zip(*parts, strict=True)))


def _leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _check_sum(loss: LossFunction, outputs: Tensor, y: Tensor) -> None:
    """Refuse a loss that is no finite number, or not a sum over examples.

    Raises:
        ValueError: Says what it is.
    """
    once = loss(outputs, y)
    if not isinstance(once, Tensor) or once.ndim or not bool(torch.isfinite(once)):
        raise ValueError(
            "likelihood: expected a loss that returns one finite number for outputs "
            f"(b, C) and targets, found {once!r}"
        )
    if float(once) == 0:  # a mean is no other there
        outputs = -1 - outputs
        once = loss(outputs, y)
    twice = float(loss(torch.cat([outputs, outputs]), torch.cat([y, y])))
    if abs(twice - 2 * float(once)) > 1e-3 * abs(float(once)):
        raise ValueError(
            "likelihood: expected a loss that sums over the examples, which is twice "
            f"as large for every example twice, found {float(once):.6g} and then "
            f"{twice:.6g}; a mean over them is not the negative log likelihood "
            '(reduction="sum")'
        )


def check_potential(value: Any) -> None:
    """Refuse what has no potential, or has yet to be given one.

    Raises:
        TypeError: Says how.
    """
    if not isinstance(value, Potential):
        raise TypeError(
            f"potential: expected a Potential, found {type(value).__name__}; "
            "Potential.of(posterior) or Potential.from_network(network, likelihood, "
            "loader) makes one"
        )
