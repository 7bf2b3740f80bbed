"""What all models share whose posterior is made of functions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
from botorch.acquisition.objective import PosteriorTransform
from botorch.exceptions.errors import UnsupportedError
from botorch.models.model import Model
from botorch.posteriors.posterior import Posterior
from torch import Tensor

from sgdgp.botorch.outputs import Evaluated, noise_variances
from sgdgp.botorch.posterior import Cursor, Noise, PathPosterior, is_affine

Part = TypeVar("Part", bound=Evaluated)


class FunctionModel(Model):
    """A model that answers with ``PathPosterior``.

    Attributes:
        seed: What observation noise is drawn from.
    """

    _supports_cache_root = False

    seed: int
    cursor: Cursor

    @abstractmethod
    def _evaluated(self) -> Sequence[Evaluated]:
        """All outputs, in their order."""

    def posterior(
        self,
        X: Tensor,
        output_indices: list[int] | None = None,
        observation_noise: bool | Tensor = False,
        posterior_transform: PosteriorTransform | None = None,
    ) -> Posterior:
        """Posterior at X, evaluated when its mean, variance or samples are asked for.

        Args:
            X: Inputs (*b, q, d) before any transform.
            output_indices: Outputs to evaluate. Default: all.
            observation_noise: Add noise: of the likelihood (where it only knows that
                of its data, their mean), or of these variances (..., q or 1, m), which
                BoTorch wants in the units after outcome transforms.
            posterior_transform: Scalarisations and expectations act on function values;
                any other is applied to the result.

        Raises:
            ValueError: Shape, dtype, device or values do not fit.
        """
        if X.ndim < 2:
            raise ValueError(f"X: expected shape (*b, q, d), found {tuple(X.shape)}")
        outputs = select_outputs(self._evaluated(), output_indices)
        native = posterior_transform is not None and is_affine(posterior_transform)
        posterior = PathPosterior(
            outputs,
            X,
            batch_shape=torch.broadcast_shapes(X.shape[:-2], self.batch_shape),
            cursor=self.cursor,
            noise=self._noise(X, outputs, observation_noise),
            transform=posterior_transform if native else None,
        )
        if posterior_transform is None or native:
            return posterior
        return posterior_transform(posterior=posterior, X=X)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Not supported: raises ``UnsupportedError``."""
        raise UnsupportedError(
            f"{type(self).__name__} is evaluated by posterior(X); what trains or "
            "cross-validates a model (marginal likelihoods, efficient_loo_cv) takes "
            "its definition, which this model follows"
        )

    def _noise(
        self, x: Tensor, outputs: Sequence[Evaluated], wanted: bool | Tensor
    ) -> Noise | None:
        if wanted is False:
            return None
        given = wanted if isinstance(wanted, Tensor) else None
        batch = torch.broadcast_shapes(x.shape[:-2], self.batch_shape)
        variances = noise_variances(outputs, x, given, batch)
        count = outputs[0].num_paths
        return Noise.drawn(self.seed, "observation noise", count, variances)

    def _set_transformed_inputs(self) -> None:
        """Data are kept as they were given."""

    def _revert_to_original_inputs(self) -> None:
        """Data are kept as they were given."""


def select_outputs(
    parts: Sequence[Part], wanted: Sequence[int] | None
) -> tuple[Part, ...]:
    """Outputs in the order in which they are wanted.

    Raises:
        ValueError: There is no such output, or none is wanted.
    """
    if wanted is None:
        return tuple(parts)
    place = [(part, i) for part in parts for i in range(len(part.columns))]
    count = len(place)
    if not wanted or any(not -count <= i < count for i in wanted):
        raise ValueError(
            f"output_indices: expected numbers from 0 to {count - 1}, found {wanted}"
        )
    # Neighbours that share a posterior are evaluated together.
    groups: list[tuple[Part, list[int]]] = []
    for part, column in (place[i] for i in wanted):
        if groups and groups[-1][0] is part:
            groups[-1][1].append(column)
        else:
            groups.append((part, [column]))
    return tuple(cast(Part, part.subset(columns)) for part, columns in groups)
