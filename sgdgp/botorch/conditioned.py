"""From a definition and data to conditioned outputs, and when they are out of date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.models import ExactGP
from torch import Tensor, nn

from sgdgp.botorch.definition import (
    Observations,
    frozen,
    single_models,
    with_modules,
    with_noise,
)
from sgdgp.botorch.outputs import Outputs
from sgdgp.botorch.units import Units, units_of
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.core.hashes import digest
from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import prior_of
from sgdgp.gpytorch_adapter.data import training_data
from sgdgp.posterior import condition
from sgdgp.solvers import Solver


@dataclass(frozen=True)
class SolveSettings:
    """How each posterior is made; see ``sgdgp.condition``."""

    solver: Solver | str
    num_samples: int
    num_features: int
    seed: int
    operator: str
    memory_budget: int | None
    progress: bool | None


@dataclass(frozen=True, eq=False)
class Conditioned:
    """Outputs of all posteriors, and the hyperparameters they belong to."""

    outputs: tuple[Outputs, ...]
    state: Mapping[str, Tensor]

    def __deepcopy__(self, memo: dict[int, object]) -> Conditioned:
        """Itself: nothing in here ever changes."""
        return self


def state_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters and buffers."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def is_same_state(module: nn.Module, state: Mapping[str, Tensor]) -> bool:
    """Whether parameters and buffers are those of ``state_of``."""
    current = module.state_dict()
    return current.keys() == state.keys() and all(
        value.dtype == state[name].dtype
        and value.device == state[name].device
        and torch.equal(value, state[name])
        for name, value in current.items()
    )


@dataclass(frozen=True, eq=False)
class Problem:
    """A model of one kernel and its data, as ``sgdgp.condition`` takes them.

    Attributes:
        model: The model.
        x: Inputs (n, d).
        y: Targets (n, m).
        units: From the units of y to the user's.
    """

    model: ExactGP
    x: Tensor
    y: Tensor
    units: Units


def problems_of(
    definition: nn.Module,
    data: Sequence[Observations],
    input_transform: InputTransform | None,
    outcome_transform: OutcomeTransform | None,
) -> tuple[Problem, ...]:
    """The problems behind a definition, with the transforms that it lacks."""
    models = single_models(definition)
    if len(models) == 1:
        models = models * len(data)
    problems, first = [], 0
    for model, seen in zip(models, data, strict=True):
        own = model
        if input_transform is not None:
            own = with_modules(model, input_transform=input_transform)
        transform = outcome_transform
        if transform is not None and len(data) > 1:
            transform = transform.subset_output([first])
        problems.append(_problem(own, seen, transform))
        first += seen.num_outputs
    return tuple(problems)


def learn_transforms(
    input_transform: InputTransform | None,
    outcome_transform: OutcomeTransform | None,
    data: Sequence[Observations],
) -> None:
    """Let what learns from data (Normalize, Standardize) do so, once."""
    if input_transform is not None and input_transform.training:
        input_transform(data[0].x)
        input_transform.eval()
    if outcome_transform is not None and outcome_transform.training:
        if any(len(seen.x) != len(data[0].x) for seen in data):
            raise ValueError(
                "outcome_transform: expected outputs with the same data, found "
                f"{', '.join(str(len(seen.x)) for seen in data)} rows; give each "
                "definition its own transform"
            )
        targets = torch.cat([seen.y for seen in data], dim=1)
        outcome_transform(targets, X=data[0].x)
        outcome_transform.eval()


def _problem(
    model: ExactGP, seen: Observations, transform: OutcomeTransform | None
) -> Problem:
    width = seen.num_outputs
    units = Units(seen.y.new_zeros(width), seen.y.new_ones(width))
    y, variances = seen.y, seen.variances
    if getattr(getattr(model, "input_transform", None), "is_one_to_many", False):
        raise UnsupportedModelError(
            f"input_transform: {type(model.input_transform).__name__} makes several "
            "points of one, which is not supported; perturb the points yourself and "
            "use an ExpectationPosteriorTransform or an objective over them"
        )
    own = getattr(model, "outcome_transform", None)
    if own is not None:
        read = units_of(frozen(own), width, seen.y)
        if read.is_affine:
            # It stays on the model.
            variances = None if variances is None else variances / read.factor**2
        else:
            model, transform = with_modules(model, outcome_transform=None), own
    if transform is not None:
        transform = frozen(transform)
        with torch.no_grad():
            y, variances = transform(y, variances, X=seen.x)
        units = units_of(transform, width, seen.y)
    if variances is not None:
        several = isinstance(model.likelihood, MultitaskGaussianLikelihood)
        model = with_noise(model, variances if several else variances[:, 0])
    return Problem(model, seen.x, y, units)


def check_problems(problems: Sequence[Problem]) -> None:
    """Refuse what could not be conditioned, before any work.

    Raises:
        UnsupportedModelError: A prior is not a function of two points.
        ValueError: Data do not fit their model.
    """
    for problem in problems:
        training_data(problem.model, problem.x, problem.y)
        prior = prior_of(problem.model, problem.x)
        if prior.num_outputs not in (1, problem.y.shape[1]):
            raise ValueError(
                f"train_Y: expected {prior.num_outputs} columns, one for each task of "
                f"the definition, found shape {tuple(problem.y.shape)}"
            )


def conditioned(
    problems: Sequence[Problem], settings: SolveSettings
) -> tuple[Outputs, ...]:
    """Outputs of the posterior of every problem."""
    found = []
    for problem in problems:
        # Outputs that were seeded alike would have the same prior draws.
        generator = derived_generator(settings.seed, digest(problem.y))
        posterior = condition(
            problem.model,
            problem.x,
            problem.y,
            solver=settings.solver,
            num_samples=settings.num_samples,
            seed=generator,
            num_features=settings.num_features,
            operator=settings.operator,
            memory_budget=settings.memory_budget,
            progress=settings.progress,
        )
        columns = tuple(range(problem.y.shape[1]))
        found.append(Outputs(posterior, columns, problem.units, posterior.functions))
    return tuple(found)
