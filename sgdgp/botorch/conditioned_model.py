"""A model's definition, its data, and what was conditioned on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from sgdgp.botorch.conditioned import (
    Conditioned,
    Problem,
    SolveSettings,
    check_problems,
    conditioned,
    is_same_state,
    learn_transforms,
    problems_of,
    state_of,
)
from sgdgp.botorch.definition import Observations, single_models
from sgdgp.botorch.evaluation import FunctionModel, chosen
from sgdgp.botorch.outputs import Outputs
from sgdgp.botorch.posterior import Cursor


class _Kept:
    """What was conditioned last; shared by the model and its subsets."""

    def __init__(self, conditioned: Conditioned | None = None) -> None:
        self.conditioned = conditioned


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
        self._kept = _Kept()
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
        own = targets if self.columns is None else [targets[i] for i in self.columns]
        return own[0] if len(own) == 1 else torch.stack(own)

    def _evaluated(self) -> tuple[Outputs, ...]:
        return chosen(self.all_outputs(), self.columns)

    def keep(self, conditioned: Conditioned) -> None:
        """Take over what was conditioned elsewhere."""
        self._kept = _Kept(conditioned)

    def all_outputs(self) -> tuple[Outputs, ...]:
        """Conditioned outputs, of the hyperparameters of now."""
        kept = self._kept.conditioned
        if kept is None or not is_same_state(self, kept.state):
            outputs = conditioned(self.problems(), self.settings)
            kept = Conditioned(outputs, state_of(self))
            self._kept.conditioned = kept
        return kept.outputs

    def problems(self) -> tuple[Problem, ...]:
        """What is conditioned."""
        return problems_of(
            self.definition,
            self.observations,
            getattr(self, "input_transform", None),
            getattr(self, "outcome_transform", None),
        )
