"""The posterior of a model with correlated outputs: one over (input, task) pairs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.distributions import MultitaskMultivariateNormal
from jaxtyping import Float
from linear_operator.operators import DiagLinearOperator, RootLinearOperator
from torch import Tensor

from sgdgp.gpytorch_adapter import PairPrior, pairs_of
from sgdgp.posterior.functions import Points
from sgdgp.posterior.output_paths import OutputFunctions, PairPaths
from sgdgp.posterior.outputs import MultiOutputPosterior, given_noise, new_targets
from sgdgp.posterior.pathwise import PathwisePosterior


@dataclass(frozen=True, eq=False)
class MultitaskPosterior(MultiOutputPosterior):
    """The posterior of a model with correlated outputs (``MultitaskKernel``)."""

    kind = "multitask"

    @classmethod
    def of(cls, inner: PathwisePosterior) -> MultitaskPosterior:
        """The outputs of a posterior over pairs [x, t]."""
        paths = PairPaths(inner.paths)
        return cls(inner.solution, inner.num_samples, inner.timings, paths, (inner,))

    @property
    def _prior(self) -> PairPrior:
        prior = self.parts[0].paths.prior
        assert isinstance(prior, PairPrior)
        return prior

    def draw(self, k: int, *, seed: int | torch.Generator = 1) -> OutputFunctions:
        """New functions; outputs are correlated as the model says."""
        drawn = self.parts[0].draw(k, seed=seed)
        return OutputFunctions(PairPaths(drawn.paths), drawn.solution)

    def update(
        self,
        x_new: Points,
        y_new: Float[Tensor, "m t"],
        *,
        noise: Float[Tensor, "m t"] | Float[Tensor, " m"] | None = None,
        **settings: Any,
    ) -> MultitaskPosterior:
        """The posterior given more data; see ``MultiOutputPosterior.update``."""
        flat, _ = self.paths.flattened(x_new)
        tasks = self.num_outputs
        y_new = new_targets(y_new, len(flat), tasks)
        rows = (~torch.isnan(y_new)).flatten().nonzero().squeeze(1)
        scales = self._prior.target_scales
        units = [scale.to_model_units(y_new[:, t]) for t, scale in enumerate(scales)]
        if noise is not None:
            noise = given_noise(noise, len(flat), tasks)
            factor = noise.new_tensor([scale.scale for scale in scales])
            settings["noise"] = (noise / factor.square()).flatten()[rows]
        return MultitaskPosterior.of(
            self.parts[0].update(
                pairs_of(flat, tasks)[rows],
                torch.stack(units, dim=1).flatten()[rows],
                **settings,
            )
        )

    def _joint(
        self, mean: Tensor, root: Tensor, noise: Tensor | None
    ) -> MultitaskMultivariateNormal:
        covariance = RootLinearOperator(root.flatten(0, 1))
        if noise is not None:
            covariance = covariance + DiagLinearOperator(noise.flatten())
        return MultitaskMultivariateNormal(mean, covariance)

    def likelihood_noise(self, x: Tensor) -> Tensor:
        pairs = pairs_of(x, self.num_outputs)
        factor = x.new_tensor([scale.scale for scale in self._prior.target_scales])
        return factor.square() * self._prior.noise(pairs).reshape(len(x), -1)
