"""What a fit is asked for, what it knows between two stages, and what it reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

from sgdgp.networks.expectation_maximisation import PrecisionUpdate
from sgdgp.networks.likelihoods import Gaussian, Likelihood
from sgdgp.networks.weight_priors import WeightPrior
from sgdgp.networks.weight_solvers import WeightSolver

CurvatureAt: TypeAlias = Literal["linear", "network"]
"""Outputs at which the likelihood's Hessian is taken."""


@dataclass(frozen=True)
class EMStep:
    """One step of expectation maximisation.

    Attributes:
        precisions: alpha before the step, one for each group.
        effective_dimension: gamma, one for each group.
        standard_error: Of gamma's sum.
        noise: Noise variance before the step; None for other likelihoods.
        loss: Negative log-likelihood of the linear model, summed over the data.
        errors: Bounds on the relative errors of mean and samples.
        passes: Passes over the data so far.
        seconds: Wall time so far.
    """

    precisions: tuple[float, ...]
    effective_dimension: tuple[float, ...]
    standard_error: float
    noise: float | tuple[float, ...] | None
    loss: float
    errors: tuple[float, ...]
    passes: float
    seconds: float


@dataclass(frozen=True)
class Schedule:
    """How much is done.

    Attributes:
        num_samples: Samples that learn the precisions.
        final_samples: Samples of the posterior.
        steps: Most steps of expectation maximisation; 0 keeps the precision.
        precision: Where it starts. Default: the curvature's largest eigenvalue.
        solver: For all linear systems.
        seed: Of everything random.
        columns: Most samples solved for together.
    """

    num_samples: int
    final_samples: int
    steps: int
    precision: float | None
    solver: WeightSolver
    seed: int
    columns: int


@dataclass
class RunState:
    """What a run knows between two stages; all that a checkpoint has to hold.

    Attributes:
        prior: With the precisions as they are.
        likelihood: With the noise as it is.
        mean: vbar, whitened (D, 1).
        samples: v, whitened (D, k).
        step: Steps of expectation maximisation that are done.
        is_learned: Whether learning has ended.
        finished: Columns of ``samples`` that are final.
        update: The damping so far.
        history: One entry a step.
        passes: Passes over the data so far.
        seconds: Wall time so far.
        warnings: Sentences a user can act on.
    """

    prior: WeightPrior
    likelihood: Likelihood
    mean: Float[Tensor, "D 1"]
    samples: Float[Tensor, "D k"]
    step: int = 0
    is_learned: bool = False
    finished: int = 0
    update: PrecisionUpdate = field(default_factory=PrecisionUpdate)
    history: list[EMStep] = field(default_factory=list)
    passes: float = 0.0
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)


def noise_in_use(likelihood: Likelihood) -> float | tuple[float, ...] | None:
    """Noise variance of a Gaussian likelihood, None for others."""
    return likelihood.variance if isinstance(likelihood, Gaussian) else None


def warn_once(state: RunState, sentence: str) -> None:
    """Keep the last sentence of each kind only."""
    kind = sentence.split(maxsplit=3)[:3]
    others = [kept for kept in state.warnings if kept.split(maxsplit=3)[:3] != kind]
    state.warnings = [*others, sentence]
