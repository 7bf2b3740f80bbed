"""Weights of many networks, chain by chain, and what they say of themselves.

Weights are rows in the order of ``Tangent``; draws of chains are (chains, draws, D).
Where chains sit in copies of one network that differ by a symmetry, R-hat of single
weights is large and says nothing: mixing is judged by outputs at some examples, which
no symmetry moves.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sgdgp.core.codec import fitting, read_values, write_values
from sgdgp.core.files import FileKind, path_of, place_of, reads
from sgdgp.networks.likelihoods import Bernoulli, Categorical, Gaussian
from sgdgp.networks.predictive import GaussianPrediction
from sgdgp.networks.sampling.diagnostics import bulk_ess, split_r_hat, tail_ess
from sgdgp.tangent import Tangent

KIND = FileKind("sgdgp.networks.draws", 1, "draws of networks")

MIXED = 1.05
"""Largest R-hat of outputs that counts as mixed. The paper's 1.01 is for one quantity;
here it is the largest of hundreds, each with its own noise."""

_LEAST_ACCEPTANCE = 0.4
"""Below it a trajectory is mostly thrown away: half the step size costs less."""

_LEAST_DRAWS = 4  # of a chain, for R-hat

_TOGETHER = 256  # draws that are read and run at once

Ess: TypeAlias = Literal["bulk", "tail"]
"""What an effective sample size is for: means and medians, or 5 % and 95 % quantiles"""


@runtime_checkable
class Model(Protocol):
    """What draws are of: a ``LinearisedPosterior``, or a ``Potential``."""

    @property
    def tangent(self) -> Tangent:
        """The network as a function of its weights."""

    @property
    def likelihood(self) -> Any:
        """Of the targets."""


@dataclass(eq=False, repr=False)
class Draws:
    """Draws of chains, such as ``hmc`` gives; ``print`` them for a summary.

    Attributes:
        weights: Flat, as rows (chains, draws, D).
        names: Of the weights' tensors, in order.
        shapes: Of each.
        energies: The potential U, minus log posterior density, of each draw.
        acceptance: Probability with which each was accepted.
        divergent: Where a trajectory's energy was lost.
        outputs: The networks' outputs at some training examples (chains, draws, m), by
            which mixing is judged.
        step_size: Of the sampler.
        num_gradients: Gradients of single networks, warm-up included.
        seconds: Wall time.
        warnings: Sentences that say what a user may want to do.
    """

    weights: Float[Tensor, "chains draws D"]
    names: Sequence[str]
    shapes: Sequence[Sequence[int]]
    energies: Float[Tensor, "chains draws"] | None = None
    acceptance: Float[Tensor, "chains draws"] | None = None
    divergent: Bool[Tensor, "chains draws"] | None = None
    outputs: Float[Tensor, "chains draws m"] | None = None
    step_size: float | None = None
    num_gradients: int = 0
    seconds: float = 0.0
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self.names, self.warnings = tuple(self.names), tuple(self.warnings)
        self.shapes = tuple(tuple(shape) for shape in self.shapes)
        size = sum(map(math.prod, self.shapes))
        if self.weights.ndim != 3 or self.weights.shape[2] != size:
            raise ValueError(
                f"weights: expected shape (chains, draws, {size}), found "
                f"{tuple(self.weights.shape)}"
            )
        if len(self.names) != len(self.shapes):
            raise ValueError(
                f"names: expected {len(self.shapes)}, one for each of shapes, found "
                f"{len(self.names)}"
            )
        for name in ("energies", "acceptance", "divergent", "outputs"):
            value = getattr(self, name)
            if value is not None and value.shape[:2] != self.weights.shape[:2]:
                raise ValueError(
                    f"{name}: expected chains and draws {tuple(self.weights.shape[:2])}"
                    f" as of weights, found {tuple(value.shape[:2])}"
                )

    @property
    def num_chains(self) -> int:
        """How many chains."""
        return self.weights.shape[0]

    @property
    def num_draws(self) -> int:
        """Draws of each chain."""
        return self.weights.shape[1]

    @property
    def num_weights(self) -> int:
        """D."""
        return self.weights.shape[2]

    @property
    def flat(self) -> Float[Tensor, "K D"]:
        """The draws of all chains, one after the other."""
        return self.weights.flatten(0, 1)

    def r_hat(self) -> Float[Tensor, " D"]:
        """Split R-hat of each weight, rank-normalised.

        Raises:
            ValueError: Fewer than four draws.
        """
        return split_r_hat(self.weights)

    def ess(self, kind: Ess = "bulk") -> Float[Tensor, " D"]:
        """Effective sample size of each weight.

        Args:
            kind: "bulk", of means and medians, or "tail", of 5 % and 95 % quantiles.

        Raises:
            ValueError: No such kind, or fewer than four draws.
        """
        if kind not in get_args(Ess):
            raise ValueError(f'kind: expected "bulk" or "tail", found {kind!r}')
        return (bulk_ess if kind == "bulk" else tail_ess)(self.weights)

    @torch.no_grad()
    def function(self, model: Model, x: Any) -> Float[Tensor, "chains draws b C"]:
        """Outputs of every network at x.

        Args:
            model: The posterior or potential that was sampled.
            x: Inputs as the network takes them.

        Raises:
            ValueError: There are none, or they are of another architecture; names what
                differs.
        """
        if not self.num_chains * self.num_draws:
            raise ValueError(
                "draws: expected at least one, found none, such as of a run that was "
                "stopped in warm-up"
            )
        tangent = model.tangent
        self.check_fits(tangent)
        found = []
        # Not all at once: weights may be in a file that memory does not hold.
        for some in self.weights.split(max(1, _TOGETHER // self.num_chains), dim=1):
            rows = some.flatten(0, 1).to(tangent.theta)
            found.append(tangent.outputs_of(rows, x).unflatten(0, some.shape[:2]))
        return torch.cat(found, 1)

    def predict(
        self, model: Model, x: Any
    ) -> Float[Tensor, "b *P C"] | GaussianPrediction:
        """Mean class or label probabilities (b, C), or mean and variance of outputs.

        Examples with several positions have probabilities (b, P, C).

        Args:
            model: The posterior or potential that was sampled.
            x: Inputs as the network takes them.

        Raises:
            TypeError: The model has a loss in place of a likelihood.
            ValueError: The draws are of another architecture.
        """
        likelihood = model.likelihood
        if not isinstance(likelihood, Gaussian | Bernoulli | Categorical):
            raise TypeError(
                "model: expected one with Categorical(), Bernoulli() or Gaussian(), "
                f"found {likelihood!r}; draws.function(model, x) has the outputs"
            )
        outputs = self.function(model, x).flatten(0, 1).permute(1, 2, 0)
        if isinstance(likelihood, Gaussian):
            mean, variance = outputs.mean(-1), outputs.var(-1, correction=0)
            return GaussianPrediction(mean, variance, likelihood.variance)
        if isinstance(likelihood, Bernoulli):
            return outputs.sigmoid().mean(-1)
        each = likelihood.by_position(outputs).softmax(1).mean(-1)
        b = len(outputs)
        return each if len(each) == b else each.unflatten(0, (b, -1))

    def check_fits(self, tangent: Tangent) -> None:
        """Refuse a network whose weights are others than these.

        Raises:
            ValueError: Names the first that differs.
        """
        here = [
            (name, tuple(shape))
            for name, shape in zip(tangent.names, tangent.shapes, strict=True)
        ]
        own = list(zip(self.names, self.shapes, strict=True))
        for there, expected in zip(here, own, strict=False):
            if there != expected:
                raise ValueError(
                    f"draws: expected weights {there[0]!r} {there[1]} as the network "
                    f"has, found {expected[0]!r} {expected[1]}: they are of another "
                    "architecture"
                )
        if len(here) != len(own):
            raise ValueError(
                f"draws: expected the {len(here)} tensors of the network, found "
                f"{len(own)}: they are of another architecture"
            )

    def caveats(self) -> tuple[str, ...]:
        """What the draws themselves say against their use, in sentences."""
        found = []
        is_chain = self.acceptance is not None or self.num_draws > 1
        if is_chain and self.num_chains == 1:
            found.append(
                "One chain only: R-hat compares its halves, and cannot know of what it "
                "has never visited. Run four or more."
            )
        if not is_chain:
            pass  # members of an ensemble, which do not mix
        elif self.num_draws < _LEAST_DRAWS:
            found.append(
                f"{self.num_draws} draws of each chain only: whether they have mixed "
                "cannot be said. Draw more."
            )
        elif self.outputs is not None and bool(self.outputs.isnan().any()):
            found.append(
                "These draws cannot be used: outputs of some networks are NaN, such as "
                "where weights overflow."
            )
        elif self.outputs is not None:
            r_hat = split_r_hat(self.outputs)
            moving = r_hat[~r_hat.isnan()]
            if len(moving) == 0:
                found.append("The chains have not moved: no output ever changed.")
            elif float(moving.max()) > MIXED:
                found.append(
                    "The chains have not mixed: the largest R-hat of the outputs is "
                    f"{float(moving.max()):.3f}, expected at most {MIXED}. They are in "
                    "different modes or too short, and no mean over them describes the "
                    "posterior. Draw more; if they began apart, see whether chains "
                    "that begin at one mode (start=None) mix."
                )
        if self.acceptance is not None and self.acceptance.numel():
            rate = float(self.acceptance.mean())
            if rate < _LEAST_ACCEPTANCE:
                found.append(
                    f"Only {rate:.0%} of the proposals were accepted, expected at "
                    f"least {_LEAST_ACCEPTANCE:.0%}: the step size"
                    f"{'' if self.step_size is None else f' {self.step_size:.3g}'} is "
                    "too large. Give a smaller one, or none and more warm-up."
                )
        if self.divergent is not None and bool(self.divergent.any()):
            found.append(
                f"{int(self.divergent.sum())} of {self.divergent.numel()} trajectories "
                "diverged: there are places with more curvature than the step size "
                "allows, and the draws avoid them. Give a smaller step_size."
            )
        return tuple(found)

    def __repr__(self) -> str:
        """What it is, not its numbers."""
        return (
            f"Draws({self.num_chains} chains x {self.num_draws} draws of "
            f"{self.num_weights} weights)"
        )

    def __str__(self) -> str:
        """The summary."""
        lines = [
            f"{self.num_chains} chains x {self.num_draws} draws of {self.num_weights} "
            f"weights, {self.num_gradients} gradients in {self.seconds:.1f} s"
        ]
        if self.seconds > 0 and self.num_gradients:
            lines[0] += f" ({self.num_gradients / self.seconds:.0f} a second)"
        if self.acceptance is not None and self.acceptance.numel():
            step = "" if self.step_size is None else f", step size {self.step_size:.3g}"
            lost = 0 if self.divergent is None else int(self.divergent.sum())
            rate = float(self.acceptance.mean())
            lines.append(f"  acceptance {rate:.2f}{step}, {lost} divergent")
        if self.num_draws >= _LEAST_DRAWS:
            if self.outputs is not None:
                lines.append(f"  outputs: {_mixing(self.outputs)}")
            lines.append(f"  weights: {_mixing(self.weights)}")
        lines += [
            f"  {sentence}"
            for sentence in dict.fromkeys((*self.caveats(), *self.warnings))
        ]
        return "\n".join(lines)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the draws to a file; ``Draws.load`` reads it.

        Raises:
            StorageError: Nothing can be written there.
            TypeError: ``path`` is no path.
            OSError: The disk is full; an old file is untouched.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_values(place_of(path), KIND, values)

    @staticmethod
    def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Draws:
        """Read draws that were saved.

        Args:
            path: The file.
            device: Where they are to be.

        Raises:
            StorageError: The file is missing, damaged, of another kind or of a newer
                format.
            TypeError: An argument is of the wrong kind.
        """
        return load_draws(path, device)

    def to_arviz(self) -> Any:
        """The draws for ArviZ: every tensor of weights, and what the sampler noted.

        Returns:
            What the ``arviz`` that is installed takes: a ``DataTree``, before version 1
            an ``InferenceData``.

        Raises:
            ImportError: ArviZ is not installed.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "to_arviz needs ArviZ; install it with pip install 'sgdgp[arviz]'"
            ) from error
        sizes = list(map(math.prod, self.shapes))
        posterior = {
            name: part.unflatten(2, shape or (1,)).numpy(force=True)
            for name, shape, part in zip(
                self.names, self.shapes, self.weights.split(sizes, dim=2), strict=True
            )
        }
        noted = {
            "lp": None if self.energies is None else -self.energies,
            "acceptance_rate": self.acceptance,
            "diverging": self.divergent,
        }
        statistics = {
            name: value.numpy(force=True)
            for name, value in noted.items()
            if value is not None
        }
        groups = {"posterior": posterior, "sample_stats": statistics}
        if int(arviz.__version__.partition(".")[0]) >= 1:
            return arviz.from_dict(groups)
        return arviz.from_dict(**groups)


@reads(KIND)
def load_draws(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> Draws:
    """Read draws; see ``Draws.load``."""
    place = path_of(path)
    if not isinstance(device, str | torch.device):
        raise TypeError(
            f"device: expected one for {place}, draws of networks, found {device!r}"
        )
    found = read_values(place, KIND, device)
    with fitting(place, "version"):
        return Draws(**{field.name: found[field.name] for field in fields(Draws)})


def _mixing(values: Tensor) -> str:
    """R-hat and effective sample sizes of many quantities in a line."""
    r_hat, bulk, tail = split_r_hat(values), bulk_ess(values), tail_ess(values)
    return (
        f"R-hat median {float(r_hat.nanmedian()):.3f}, largest "
        f"{float(r_hat.nan_to_num(-math.inf, math.inf).max()):.3f}; effective draws, "
        f"smallest: bulk {float(bulk.min()):.0f}, tail {float(tail.min()):.0f}"
    )
