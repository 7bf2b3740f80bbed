"""A definition and its data, conditioned when it is needed, and after it has changed.

What is conditioned are problems of one kernel each (``definition.py``); new data go to
each of their posteriors by a warm solve.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import cast

import torch
from botorch.models.transforms.outcome import OutcomeTransform
from gpytorch.likelihoods import MultitaskGaussianLikelihood
from gpytorch.models import ExactGP
from torch import Tensor, nn

from sgdgp.botorch.definition import (
    Observations,
    frozen,
    held_data,
    own_data,
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
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import derived_generator
from sgdgp.gpytorch_adapter import has_fixed_noise, prior_of
from sgdgp.gpytorch_adapter.data import training_data
from sgdgp.posterior import MultiOutputPosterior, Posterior, condition
from sgdgp.solvers import Solver


@dataclass
class _Latest:
    """What was conditioned last, and of which parameters; subsets of a model share it.

    Neither ever changes: a copy of the model has the same, until it conditions again.
    """

    outputs: tuple[Outputs, ...] = ()
    state: Mapping[str, Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> _Latest:
        return replace(self)


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
        data: Iterable[Observations],
        settings: SolveSettings,
        *,
        follows: bool,
        **transforms: nn.Module | None,
    ) -> None:
        """Put the model together; part of the constructor, and of ``load``.

        Args:
            definition: The definition.
            data: Data of each of its posteriors.
            settings: How to condition.
            follows: Whether the data are the definition's, whatever it is given.
            **transforms: Transforms that the definition lacks.

        Raises:
            UnsupportedModelError: A prior is not a function of two points.
            ValueError: Data do not fit, or a transform is given twice.
        """
        self.definition = definition
        self.settings = settings
        self.seed = settings.seed
        self._data = nn.ModuleList(data)
        self._held = nn.ModuleList(held_data(definition) if follows else ())
        for name, given in transforms.items():
            if given is not None:
                if any(hasattr(part, name) for part in single_models(definition)):
                    raise ValueError(f"{name}: the definition has one already")
                setattr(self, name, given)
        self._learn_transforms()
        for problem in self.problems():
            training_data(problem.model, problem.x, problem.y)
            tasks = prior_of(problem.model, problem.x).num_outputs
            if tasks not in (1, problem.y.shape[1]):
                raise ValueError(
                    f"train_Y: expected {tasks} columns, one for each task of "
                    f"the definition, found shape {tuple(problem.y.shape)}"
                )
        self._latest = _Latest()
        self.cursor = Cursor()
        self.columns: tuple[int, ...] | None = None

    @property
    def num_outputs(self) -> int:
        if self.columns is not None:
            return len(self.columns)
        return sum(seen.num_outputs for seen in self.observations)

    @property
    def batch_shape(self) -> torch.Size:
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

    def keep(self, outputs: Iterable[Outputs]) -> None:
        """Take over what was conditioned elsewhere."""
        self._latest = _Latest(tuple(outputs), state_of(self))

    @outside_inference_mode
    def all_outputs(self) -> tuple[Outputs, ...]:
        """Conditioned outputs, of the hyperparameters of now."""
        latest = self._latest
        self._follow()
        if latest.state is None or not is_same_state(self, latest.state):
            if torch._C._are_functorch_transforms_active():
                raise RuntimeError(
                    "the model has yet to be conditioned, which torch.func does not "
                    "allow; ask for model.posteriors before"
                )
            outputs = tuple(map(self._conditioned, self.problems()))
            latest.outputs, latest.state = outputs, state_of(self)
        return latest.outputs

    def _conditioned(self, problem: ModelData) -> Outputs:
        # Outputs that were seeded alike would have the same prior draws.
        seed = derived_generator(self.seed, digest(problem.y)).initial_seed()
        settings = {**vars(self.settings), "seed": seed}
        posterior = condition(problem.model, problem.x, problem.y, **settings)
        return problem.outputs_of(posterior)

    def _follow(self) -> None:
        """Take over data that the definition was given since."""
        held = held_data(self.definition) if len(self._held) else []
        known = cast(list[Observations], list(self._held))
        if all(map(Observations.is_same, known, held)):
            return
        data = [own_data(model) for model in single_models(self.definition)]
        # In place: models of some of the outputs have the same.
        for old, new in zip(known, held, strict=True):
            old.replace(new)
        for old, new in zip(self.observations, data, strict=True):
            old.replace(new)
        self._latest.state = None

    def problems(self) -> tuple[ModelData, ...]:
        """What is conditioned: the definition's models, with transforms they lack."""
        models, data = single_models(self.definition), self.observations
        if len(models) == 1:
            models = models * len(data)
        problems, first = [], 0
        for model, seen in zip(models, data, strict=True):
            member, given = model, getattr(self, "input_transform", None)
            if given is not None:
                member = with_modules(model, input_transform=given)
            transform = getattr(self, "outcome_transform", None)
            if transform is not None and len(data) > 1:
                transform = transform.subset_output([first])
            problems.append(_problem(member, seen, transform))
            first += seen.num_outputs
        return tuple(problems)

    def updated(
        self, x: Tensor, y: Tensor, noise: Tensor | None
    ) -> list[tuple[Outputs, Observations]]:
        """All outputs given their share of new data, with the same functions.

        Args:
            x: New inputs (n', d).
            y: Their targets (n', m), in the user's units.
            noise: Their noise variances (n', m) in the units after outcome transforms.

        Raises:
            TypeError: Data are of the wrong kind.
            ValueError: They do not fit, noise is needed, or would be estimated.
        """
        data = self.observations
        y = self._all_columns("Y", y)
        if noise is not None:
            noise = self._all_columns("noise", noise)
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
        before, data = self.all_outputs(), self.observations
        models = single_models(self.definition)
        updated, first = [], 0
        for index, (part, seen) in enumerate(zip(before, data, strict=True)):
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
                    "noise: expected none, since the likelihood estimates the noise; "
                    "known variances are for models with train_Yvar"
                )
            here, values = x[rows], y[rows][:, columns]
            targets, given = part.units.latent(values, here), None
            if noise is not None:
                new = noise[rows][:, columns]
                given = new * (part.scale / part.units.factor) ** 2
                if known is not None:
                    known = torch.cat([known.expand_as(seen.y), new * part.scale**2])
            if not isinstance(part.posterior, MultiOutputPosterior):
                targets, given = targets[:, 0], None if given is None else given[:, 0]
            posterior = part.posterior.update(
                here, targets, noise=given, progress=self.settings.progress
            )
            both = Observations(
                torch.cat([seen.x, here]), torch.cat([seen.y, values]), known
            )
            outputs = Outputs(posterior, part.columns, part.units)
            updated.append((outputs, both))
        return updated

    def _learn_transforms(self) -> None:
        """Let what learns from data (Normalize, Standardize) do so, once."""
        data = self.observations
        transform = getattr(self, "input_transform", None)
        if transform is not None and transform.training:
            transform(data[0].x)
            transform.eval()
        transform = getattr(self, "outcome_transform", None)
        if transform is not None and transform.training:
            if any(len(seen.x) != len(data[0].x) for seen in data):
                raise ValueError(
                    "outcome_transform: expected outputs with the same data, found "
                    f"{', '.join(str(len(seen.x)) for seen in data)} rows; give each "
                    "definition its own transform"
                )
            transform(torch.cat([seen.y for seen in data], dim=1), X=data[0].x)
            transform.eval()

    def _all_columns(self, name: str, values: Tensor) -> Tensor:
        """Values (n, m) of the outputs shown as those of all, NaN where there is none.

        Raises:
            ValueError: Not one column for each output.
        """
        if values.ndim < 2 or values.shape[-1] != self.num_outputs:
            raise ValueError(
                f"{name}: expected shape (n, {self.num_outputs}), found "
                f"{tuple(values.shape)}"
            )
        if self.columns is None:
            return values
        count = sum(seen.num_outputs for seen in self.observations)
        full = values.new_full((*values.shape[:-1], count), float("nan"))
        full[..., list(self.columns)] = values
        return full


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

    def outputs_of(self, posterior: Posterior) -> Outputs:
        """All outputs of the problem's posterior."""
        columns = tuple(range(self.y.shape[1]))
        return Outputs(posterior, columns, self.units)


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
