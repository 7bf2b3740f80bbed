"""``PathwiseModel``: a BoTorch model whose posterior is made of functions."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any, cast

import torch
from botorch.models.transforms.input import InputTransform
from botorch.models.transforms.outcome import OutcomeTransform
from botorch.sampling.base import MCSampler
from gpytorch.models import GP
from torch import Tensor, nn

from sgdgp.botorch.conditioned_model import ConditionedModel, SolveSettings
from sgdgp.botorch.definition import Observations, given_data, own_data, single_models
from sgdgp.botorch.fantasies import FantasyModel
from sgdgp.botorch.function_model import FunctionModel
from sgdgp.botorch.outputs import Outputs
from sgdgp.botorch.posterior import PathSampler
from sgdgp.core import format_1
from sgdgp.core.checks import check_count
from sgdgp.core.codec import can_be_stored, fitting, read_values, write_values
from sgdgp.core.files import FileKind, path_of, place_of, reads
from sgdgp.core.seeds import derived_generator, number_of, seed_of
from sgdgp.features.storage import given_by_kernel
from sgdgp.posterior import Posterior
from sgdgp.posterior.posterior import posterior_of
from sgdgp.posterior.storage import contents_of, parts_from, without_recycled
from sgdgp.solvers import Solver

KIND = FileKind("sgdgp.botorch", 2, "PathwiseModel", format_1.botorch)

DEFAULT_FEATURES = 2048
"""Random features of each group of 64 functions: more would be closer to the prior, but
an acquisition evaluates them thousands of times."""


class PathwiseModel(ConditionedModel):
    """A Gaussian process for BoTorch that scales with the solvers of sgdgp.

    Wraps a GPyTorch or BoTorch definition (kernel, mean, likelihood, transforms), whose
    hyperparameters stay its own: fit it as usual. The first posterior conditions on the
    data, later ones evaluate functions; after hyperparameters have changed, or the
    definition was given other data (``set_train_data``), the model conditions again.

    Posteriors, acquisition functions and Thompson sampling are BoTorch's own; so are
    ``ModelList`` and fantasies. A ``MultiTaskGP`` is one output over inputs that have
    their task column. Not supported: batches of models, fully Bayesian models, input
    transforms that make several points of one.

    Up to 2,000 rows of data mean and covariances are exact, and BoTorch's samplers draw
    from them as for its own models. Beyond that, samples are the values of
    ``num_samples`` functions and of their mirror images around the mean, so that 256 of
    them serve BoTorch's usual 512 Monte-Carlo samples.

    Attributes:
        definition: The definition; a submodule, so that ``state_dict`` has it.
        settings: How it is conditioned.

    Example:
        >>> definition = SingleTaskGP(train_X, train_Y)
        >>> sgdgp.fit(definition)
        >>> model = PathwiseModel(definition)
        >>> acquisition = qLogExpectedImprovement(model, best_f=train_Y.max())
        >>> candidates, value = optimize_acqf(acquisition, bounds, q=4, ...)
        >>> model = model.condition_on_observations(candidates, objective(candidates))
    """

    def __init__(
        self,
        model: GP,
        train_X: Tensor | None = None,
        train_Y: Tensor | None = None,
        *,
        train_Yvar: Tensor | None = None,
        outcome_transform: OutcomeTransform | None = None,
        input_transform: InputTransform | None = None,
        solver: Solver | str = "auto",
        num_samples: int = 256,
        num_features: int = DEFAULT_FEATURES,
        seed: int | torch.Generator = 0,
        operator: str = "auto",
        memory_budget: int | None = None,
        progress: bool | None = None,
    ) -> None:
        """A model of the data of its definition, or of those given.

        Args:
            model: An ``ExactGP``, a BoTorch ``SingleTaskGP`` of one or more outputs, or
                a ``ModelListGP``.
            train_X: Inputs (n, d) before any transform. Default: the definition's, and
                what it is given later.
            train_Y: Targets (n, m) in your units. Several columns of a definition with
                one output are independent outputs with its kernel and noise; NaN is a
                target that was not observed.
            train_Yvar: Known noise variances (n, m) in your units squared.
            outcome_transform: Of a definition without one.
            input_transform: Of a definition without one.
            solver: A solver such as ``SDD()``, its name, or "auto".
            num_samples: Sample functions S.
            num_features: Random features of each group of 64 prior draws.
            seed: Seed or generator of everything random. Outputs with other targets
                have other draws.
            operator: "auto", "dense", "tiled", "triton", "triton_medium", "keops",
                "row_blocks", "features" or "sharded" (see ``sgdgp.distribute``).
            memory_budget: Bytes that operator and solver may use.
            progress: Show progress bars of solves. Default: on a terminal.

        Raises:
            TypeError: The definition or the data are of the wrong kind.
            UnsupportedModelError: The definition is a batch, or fully Bayesian.
            ValueError: Shapes or values do not fit, or a transform is given twice.
        """
        super().__init__()
        check_count("num_samples", num_samples, 1)
        seed = number_of(seed)
        models = single_models(model)
        if train_X is not None:
            data = given_data(train_X, train_Y, train_Yvar, models)
        elif train_Y is not None or train_Yvar is not None:
            raise ValueError("train_X, train_Y: expected both, found no train_X")
        else:
            data = tuple(own_data(part) for part in models)
        settings = SolveSettings(
            solver, num_samples, num_features, seed, operator, memory_budget, progress
        )
        self.build(
            model,
            data,
            settings,
            follows=train_X is None,
            input_transform=input_transform,
            outcome_transform=outcome_transform,
        )

    @property
    def likelihood(self) -> nn.Module:
        """The definition's likelihood."""
        return cast(nn.Module, self.definition.likelihood)

    @property
    def posteriors(self) -> tuple[Posterior, ...]:
        """The sgdgp posteriors behind the outputs; conditions if need be."""
        return tuple(outputs.posterior for outputs in self._evaluated())

    def subset_output(self, idcs: list[int]) -> PathwiseModel:
        """A model of some of the outputs, that shares everything with this one.

        Args:
            idcs: Numbers of the outputs.

        Raises:
            ValueError: There is no such output, or none is wanted.
        """
        count = self.num_outputs
        if not idcs or any(not -count <= i < count for i in idcs):
            raise ValueError(
                f"idcs: expected numbers from 0 to {count - 1}, found {idcs}"
            )
        columns = range(count) if self.columns is None else self.columns
        other = self._sharing()
        other.columns = tuple(columns[i] for i in idcs)
        return other

    def condition_on_observations(
        self, X: Tensor, Y: Tensor, noise: Tensor | None = None, **kwargs: Any
    ) -> FunctionModel:
        """The model given more data, with the same functions; this one stays.

        The solve starts from the old weights. Data in batches are fantasies, see
        ``fantasize``.

        Args:
            X: New inputs (n', d).
            Y: Their targets (n', m), NaN where there is none.
            noise: Their noise variances (n', m), as everywhere in BoTorch in the units
                after outcome transforms; needed where the likelihood does not know.
            **kwargs: None are known.

        Raises:
            TypeError: Data are of the wrong kind.
            ValueError: Shapes or values do not fit, or noise is needed.
        """
        if X.ndim > 2 or Y.ndim > 2:
            dim, outputs = self.train_inputs[0].shape[1], self.num_outputs
            if X.shape[-1] != dim or Y.shape[-2:] != (*X.shape[-2:-1], outputs):
                raise ValueError(
                    f"X, Y: expected shapes (..., n, {dim}) and (..., n, {outputs}), "
                    f"found {tuple(X.shape)} and {tuple(Y.shape)}"
                )
            return self._fantasies(X, Y, noise)
        parts, data = zip(*self.updated(X, Y, noise), strict=True)
        other = self._sharing()
        other._modules["definition"] = copy.deepcopy(self.definition)
        other._modules["_data"] = nn.ModuleList(data)
        other._modules["_held"] = copy.deepcopy(self._held)
        other.keep(parts)
        other.cursor = copy.copy(self.cursor)
        return other

    def fantasize(
        self,
        X: Tensor,
        sampler: MCSampler,
        observation_noise: Tensor | None = None,
        **kwargs: Any,
    ) -> FantasyModel:
        """The model given observations at X that are drawn from its posterior.

        Draws, mean and gradients are exact: they need solves for the points X, not the
        sample functions, unless the sampler is a ``PathSampler``.

        Args:
            X: Points (*b, q, d).
            sampler: Any sampler of BoTorch, with sample shape *f.
            observation_noise: Noise variances (..., q or 1, m) in the units after
                outcome transforms. Default: the likelihood's.
            **kwargs: Ignored.

        Returns:
            A model of batch shape (*f, *b).
        """
        if isinstance(sampler, PathSampler):
            noisy = True if observation_noise is None else observation_noise
            values = sampler(self.posterior(X, observation_noise=noisy))
            return self._fantasies(X, values, observation_noise)
        return self._fantasies(X, None, observation_noise, sampler)

    def _fantasies(
        self,
        x: Tensor,
        y: Tensor | None,
        noise: Tensor | None,
        sampler: MCSampler | None = None,
    ) -> FantasyModel:
        return FantasyModel(
            self._evaluated(), x, y, noise, self.seed, self.cursor, sampler
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model into a file; ``PathwiseModel.load`` reads it.

        The file (safetensors, with a checksum, no code) holds hyperparameters, data
        and functions. A file in its place is replaced in one step.

        Args:
            path: The file; its directory must exist.

        Raises:
            NotStorableError: A feature map is not registered for storage.
            OSError: The file could not be written.
            StorageError: There is no such directory, or the path is one.
        """
        place = place_of(path)
        settings = self.settings
        if not can_be_stored(settings.solver):
            # A solver that is not of this package is in no file.
            settings = replace(settings, solver="auto")
        values: dict[str, Any] = {
            "model": dict(self.state_dict()),
            "data": [dict(seen.named_buffers()) for seen in self.observations],
            "columns": self.columns,
            "cursor": self.cursor.position,
            "settings": settings,
        }
        for index, output in enumerate(self.all_outputs()):
            parts = without_recycled(output.posterior.parts)
            for name, value in contents_of(parts).items():
                values[f"posterior.{index}.{name}"] = value
        write_values(place, KIND, values, given_by_kernel)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: GP,
        *,
        outcome_transform: OutcomeTransform | None = None,
        input_transform: InputTransform | None = None,
        solver: Solver | str | None = None,
    ) -> PathwiseModel:
        """Read a model that was saved: the same functions, without a solve.

        Args:
            path: The file.
            model: A definition built like the one that was saved; it is copied, and
                the file gives the parameters.
            outcome_transform: As the model was made with.
            input_transform: As the model was made with.
            solver: Of later solves. Default: the one that was saved.

        Raises:
            StorageError: The file is missing, damaged or of another kind, or the
                definition is built otherwise (a ValueError).
        """
        place = path_of(path)
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a gpytorch.models.GP for {place}, a PathwiseModel, "
                f"found {type(model).__name__}"
            )
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        found = read_values(place, KIND, device)
        loaded = cls.__new__(cls)
        FunctionModel.__init__(loaded)
        with fitting(place, "definition"):
            settings = found["settings"]
            loaded.build(
                copy.deepcopy(model),
                (Observations(**seen) for seen in found["data"]),
                settings if solver is None else replace(settings, solver=solver),
                follows=True,
                input_transform=copy.deepcopy(input_transform),
                outcome_transform=copy.deepcopy(outcome_transform),
            )
            loaded.load_state_dict(found["model"])
            outputs = []
            for index, problem in enumerate(loaded.problems()):
                own = found.below(f"posterior.{index}.")
                posterior = posterior_of(parts_from(own, problem.model, solver))
                outputs.append(problem.outputs_of(posterior))
            loaded.keep(outputs)
            loaded.cursor.position = int(found["cursor"])
            loaded.columns = found["columns"]
        return loaded

    def next_functions(self, count: int) -> tuple[tuple[Outputs, ...], tuple[int, ...]]:
        """Outputs, and the numbers of functions that were not given out before.

        After the last function comes the first again. More than there are are drawn
        anew, by a solve.
        """
        outputs = self._evaluated()
        numbers = self.cursor.take(count)
        if count <= self.settings.num_samples:
            return outputs, tuple(numbers.remainder(self.settings.num_samples).tolist())
        drawn = tuple(
            part.drawn(
                count,
                seed_of(derived_generator(self.seed, "draw", index, int(numbers[0]))),
            )
            for index, part in enumerate(outputs)
        )
        return drawn, tuple(range(count))

    def _sharing(self) -> PathwiseModel:
        """A model with the same modules and the same functions."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        return other


reads(KIND)(PathwiseModel.load)
