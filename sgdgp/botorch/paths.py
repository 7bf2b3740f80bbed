"""The functions of a ``PathwiseModel`` as BoTorch's sample paths.

``PathwiseThompsonSampling``, ``get_matheron_path_model`` and
``optimize_posterior_samples`` draw Matheron paths of a model; those of this model are
there already, and were conditioned by its solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from botorch.sampling.pathwise.paths import SamplePath
from botorch.sampling.pathwise.posterior_samplers import DrawMatheronPaths
from torch import Size, Tensor

from sgdgp.botorch.model import PathwiseModel
from sgdgp.botorch.outputs import Outputs, evaluate_all, in_user_units


class PathwisePath(SamplePath):
    """Sample functions with the shapes of BoTorch's Matheron paths.

    Leading dimensions of x broadcast with the sample shape from the right, as BoTorch's
    do: x (q, d) is shared by all functions, x (*b, *sample_shape, q, d) has points of
    their own. Several outputs are one more dimension, between samples and points.
    """

    def __init__(
        self, outputs: tuple[Outputs, ...], numbers: tuple[int, ...], sample_shape: Size
    ) -> None:
        """Functions of these outputs.

        Args:
            outputs: The outputs.
            numbers: Which of their functions, as many as the sample shape has.
            sample_shape: Their arrangement.
        """
        super().__init__()
        self.input_transform = None
        self.output_transform = None
        self.outputs = outputs
        self.numbers = numbers
        self.sample_shape = sample_shape
        self.num_outputs = sum(len(part.columns) for part in outputs)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """Values (*b, *sample_shape, [m,] q) at x (*b, [1 or m,] q, d)."""
        if self.num_outputs == 1:
            return self._values(x).squeeze(-1)
        if x.ndim == 2:
            return self._values(x).movedim(-1, -2)
        if x.shape[-3] == 1:
            return self._values(x.squeeze(-3)).movedim(-1, -2)
        # Every output at points of its own.
        values = [
            self._values(points)[..., output]
            for output, points in enumerate(x.unbind(-3))
        ]
        return torch.stack(values, dim=-2)

    def set_ensemble_as_batch(self, ensemble_as_batch: bool) -> None:
        """Nothing to do: the model is no ensemble."""

    def _values(self, x: Tensor) -> Tensor:
        """Values (*b, *sample_shape, q, m) at x whose batch broadcasts with it."""
        batch, joint = x.shape[:-2], x.shape[-2:]
        outer = batch[: max(0, len(batch) - len(self.sample_shape))]
        inner = batch[len(outer) :]
        if prod(inner) == 1:
            return self._shared(x.reshape(*outer, *joint))
        if torch.broadcast_shapes(inner, self.sample_shape) != self.sample_shape:
            raise ValueError(
                "x: expected a batch that broadcasts with the sample dimensions "
                f"{tuple(self.sample_shape)}, found shape {tuple(x.shape)}"
            )
        points = x.expand(*outer, *self.sample_shape, *joint)
        points = points.reshape(prod(outer), len(self.numbers), *joint)
        # Functions first: (k, outer * q, d).
        points = points.transpose(0, 1).flatten(1, 2)
        parts = [output.each(points, self.numbers) for output in self.outputs]
        values = torch.cat(parts, dim=-1)
        values = values.unflatten(1, (prod(outer), joint[0])).transpose(0, 1)
        return values.reshape(*outer, *self.sample_shape, *values.shape[-2:])

    def _shared(self, x: Tensor) -> Tensor:
        """All functions at the same points (*b, q, d)."""
        mean, deviations = evaluate_all(self.outputs, x, self.numbers)
        values = in_user_units(self.outputs, mean + deviations, x)
        values = values.reshape(*self.sample_shape, *values.shape[1:])
        samples = list(range(len(self.sample_shape)))
        first = values.ndim - 2 - len(samples)
        return values.movedim(samples, [first + i for i in samples])


@DrawMatheronPaths.register(PathwiseModel)
def draw_functions(
    model: PathwiseModel, *, sample_shape: Size | Sequence[int], **_: Any
) -> PathwisePath:
    """The next functions of the model, in the shape of BoTorch's paths.

    Consecutive calls give other functions until all have been given out. More than the
    model has are drawn anew, which costs a solve. Samplers of the prior and update
    strategies have no effect: prior draws and solver are the model's own.
    """
    shape = Size(sample_shape)
    return PathwisePath(*model.next_functions(shape.numel()), shape)
