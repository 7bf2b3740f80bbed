"""A definition and its data, conditioned when it is needed, and after it has changed.

What is conditioned are problems of one kernel each (``definition.py``); new data go to
each of their posteriors by a warm solve.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

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
from sgdgp.botorch.function_model import FunctionModel, select_outputs
from sgdgp.botorch.outputs import Outputs, Units, units_of
from sgdgp.botorch.posterior import Cursor
from sgdgp.core.checks import check_matrix, check_same
from sgdgp.core.codec import register_stored_class
from sgdgp.core.errors import UnsupportedModelError
from sgdgp.core.hashes import digest
from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import has_fixed_noise, prior_of
from sgdgp.gpytorch_adapter.data import training_data
from sgdgp.posterior import MultiOutputPosterior, condition
from sgdgp.solvers import Solver


class _Latest:
    """What was conditioned last; shared by the model and its subsets."""

    def __init__(self, conditioned: Conditioned | None = None) -> None:
        self.conditioned = conditioned


@register_stored_class
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


class ConditionedModel(FunctionModel):
    """A definition that is conditioned when it is needed, and after it has changed.

    Attributes:
        definition: The definition.
        settings: How it is conditioned.
        columns: Outputs that this model shows; None for all.
        cursor: Which functions were given out.
    """

    definition: nn.Module
    settings: SolveSettings
    columns: tuple[int, ...] | None

    def build(
        self,
        definition: nn.Module,
        data: tuple[Observations, ...],
        transforms: Mapping[str, nn.Module | None],
        settings: SolveSettings,
    ) -> None:
        """Put the model together; part of the constructor, and of ``load``.

        Args:
            definition: The definition.
            data: Data of each of its posteriors.
            transforms: Transforms that the definition lacks, by name.
            settings: How to condition.

        Raises:
            ValueError: Data do not fit, or a transform is given twice.
        """
        self.definition = definition
        self.settings = settings
        self.seed = settings.seed
        self._data = nn.ModuleList(data)
        for name, given in transforms.items():
            if given is not None:
                if any(hasattr(part, name) for part in single_models(definition)):
                    raise ValueError(f"{name}: the definition has one already")
                setattr(self, name, given)
        learn_transforms(
            getattr(self, "input_transform", None),
            getattr(self, "outcome_transform", None),
            data,
        )
        check_problems(self.problems())
        self._latest = _Latest()
        self.cursor = Cursor()
        self.columns: tuple[int, ...] | None = None

    @property
    def num_outputs(self) -> int:
        """Number of outputs m."""
        if self.columns is not None:
            return len(self.columns)
        return sum(seen.num_outputs for seen in self.observations)

    @property
    def batch_shape(self) -> torch.Size:
        """No batch."""
        return torch.Size()

    @property
    def observations(self) -> tuple[Observations, ...]:
        """The data behind each posterior, in the units of the user."""
        return cast(tuple[Observations, ...], tuple(self._data))

    @property
    def train_inputs(self) -> tuple[Tensor, ...]:
        """Inputs of the first output (n, d), as given."""
        return (self.observations[0].x,)

    @property
    def train_targets(self) -> Tensor:
        """Targets (n,) of one output, else (m, n), in the units of the user."""
        targets = [y for seen in self.observations for y in seen.y.unbind(1)]
        chosen = targets if self.columns is None else [targets[i] for i in self.columns]
        return chosen[0] if len(chosen) == 1 else torch.stack(chosen)

    def _evaluated(self) -> tuple[Outputs, ...]:
        return select_outputs(self.all_outputs(), self.columns)

    def keep(self, conditioned: Conditioned) -> None:
        """Take over what was conditioned elsewhere."""
        self._latest = _Latest(conditioned)

    def all_outputs(self) -> tuple[Outputs, ...]:
        """Conditioned outputs, of the hyperparameters of now."""
        latest = self._latest.conditioned
        if latest is None or not is_same_state(self, latest.state):
            outputs = condition_all(self.problems(), self.settings)
            latest = Conditioned(outputs, state_of(self))
            self._latest.conditioned = latest
        return latest.outputs

    def problems(self) -> tuple[ModelData, ...]:
        """What is conditioned."""
        return problems_of(
            self.definition,
            self.observations,
            getattr(self, "input_transform", None),
            getattr(self, "outcome_transform", None),
        )


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
class ModelData:
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
) -> tuple[ModelData, ...]:
    """The problems behind a definition, with the transforms that it lacks."""
    models = single_models(definition)
    if len(models) == 1:
        models = models * len(data)
    problems, first = [], 0
    for model, seen in zip(models, data, strict=True):
        member = model
        if input_transform is not None:
            member = with_modules(model, input_transform=input_transform)
        transform = outcome_transform
        if transform is not None and len(data) > 1:
            transform = transform.subset_output([first])
        problems.append(_problem(member, seen, transform))
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
) -> ModelData:
    width = seen.num_outputs
    units = Units(seen.y.new_zeros(width), seen.y.new_ones(width))
    y, variances = seen.y, seen.variances
    if getattr(getattr(model, "input_transform", None), "is_one_to_many", False):
        raise UnsupportedModelError(
            f"input_transform: {type(model.input_transform).__name__} makes several "
            "points of one, which is not supported; perturb the points yourself and "
            "use an ExpectationPosteriorTransform or an objective over them"
        )
    outcome_transform = getattr(model, "outcome_transform", None)
    if outcome_transform is not None:
        read = units_of(frozen(outcome_transform), width, seen.y)
        if read.is_affine:
            # It stays on the model.
            variances = None if variances is None else variances / read.factor**2
        else:
            model = with_modules(model, outcome_transform=None)
            transform = outcome_transform
    if transform is not None:
        transform = frozen(transform)
        with torch.no_grad():
            y, variances = transform(y, variances, X=seen.x)
        units = units_of(transform, width, seen.y)
    if variances is not None:
        several = isinstance(model.likelihood, MultitaskGaussianLikelihood)
        model = with_noise(model, variances if several else variances[:, 0])
    return ModelData(model, seen.x, y, units)


def check_problems(problems: Sequence[ModelData]) -> None:
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


def condition_all(
    problems: Sequence[ModelData], settings: SolveSettings
) -> tuple[Outputs, ...]:
    """Outputs of the posterior of every problem."""
    outputs = []
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
        outputs.append(Outputs(posterior, columns, problem.units, posterior.functions))
    return tuple(outputs)


def all_columns(
    name: str, values: Tensor, columns: Sequence[int] | None, count: int
) -> Tensor:
    """Values (..., m) of some outputs as those of all, NaN where there is none.

    Raises:
        ValueError: Not one column for each output.
    """
    width = count if columns is None else len(columns)
    if values.ndim < 2 or values.shape[-1] != width:
        raise ValueError(
            f"{name}: expected shape (n, {width}), found {tuple(values.shape)}"
        )
    if columns is None:
        return values
    full = values.new_full((*values.shape[:-1], count), float("nan"))
    full[..., list(columns)] = values
    return full


def update_outputs(
    outputs: Sequence[Outputs],
    data: Sequence[Observations],
    definition: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    progress: bool | None,
) -> list[tuple[Outputs, Observations]]:
    """Every output given its share of new data, with the same functions.

    Args:
        outputs: All outputs of a model.
        data: Their data so far.
        definition: The model's definition.
        x: New inputs (n', d).
        y: New targets (n', m), in the user's units.
        noise: New noise variances (n', m) in the units after outcome transforms.
        progress: Show progress bars.

    Raises:
        TypeError: Data are of the wrong kind.
        ValueError: They do not fit, noise is needed, or would be estimated.
    """
    check_matrix("X", x, data[0].x.shape[1])
    check_same("X", x, "the training inputs", data[0].x)
    check_same("Y", y, "X", x)
    if len(x) != len(y):
        raise ValueError(
            f"Y: expected {len(x)} rows, one for each row of X, found {len(y)}"
        )
    if noise is not None and noise.shape != y.shape:
        raise ValueError(
            f"noise: expected shape {tuple(y.shape)}, found {tuple(noise.shape)}"
        )
    models = single_models(definition)
    updated, first = [], 0
    for index, (part, seen) in enumerate(zip(outputs, data, strict=True)):
        columns = slice(first, first + seen.num_outputs)
        first += seen.num_outputs
        rows = ~torch.isnan(y[:, columns]).all(dim=1)
        if not bool(rows.any()):
            updated.append((part, seen))
            continue
        likelihood = models[min(index, len(models) - 1)].likelihood
        known = seen.variances
        if known is None and has_fixed_noise(likelihood):
            # From now on the definition does not know all of them.
            fixed = likelihood.noise_covar.noise.reshape(len(seen.y), -1)
            known = part.scale**2 * fixed
        elif known is None and noise is not None:
            raise ValueError(
                "noise: expected none, since the likelihood estimates the noise; known "
                "variances are for models with train_Yvar"
            )
        given = None if noise is None else noise[rows][:, columns]
        targets = y[rows][:, columns]
        updated.append(
            _update_one(part, seen, known, x[rows], targets, given, progress)
        )
    return updated


def _update_one(
    part: Outputs,
    seen: Observations,
    known: Tensor | None,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    progress: bool | None,
) -> tuple[Outputs, Observations]:
    settings: dict[str, Any] = {"progress": progress}
    targets = part.units.latent(y, x)
    if noise is not None:
        settings["noise"] = noise * (part.scale / part.units.factor) ** 2
    if not isinstance(part.posterior, MultiOutputPosterior):
        targets = targets[:, 0]
        if noise is not None:
            settings["noise"] = settings["noise"][:, 0]
    posterior = part.posterior.update(x, targets, **settings)
    if known is not None and noise is not None:
        known = torch.cat([known.expand_as(seen.y), noise * part.scale**2])
    data = Observations(torch.cat([seen.x, x]), torch.cat([seen.y, y]), known)
    return part.of(posterior), data
