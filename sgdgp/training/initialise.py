"""A start for the parameters: exact fits on small subsets, averaged."""

from __future__ import annotations

import copy
import warnings
from typing import Literal, TypeAlias

import gpytorch
import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count
from sgdgp.core.inference import with_gradients
from sgdgp.core.seeds import generator_of
from sgdgp.gpytorch_adapter import Inputs, layout_of, training_data
from sgdgp.training.fit import fit
from sgdgp.training.gradient import EXACT_ROWS
from sgdgp.training.parameters import from_average, learned_parameters, to_average

SubsetKind: TypeAlias = Literal["neighbourhoods", "random"]


@with_gradients
def initialise(
    model: ExactGP,
    x: Inputs | None = None,
    y: Float[Tensor, " n"] | Float[Tensor, "n t"] | None = None,
    *,
    subsets: int = 5,
    size: int = EXACT_ROWS,
    kind: SubsetKind = "neighbourhoods",
    steps: int = 50,
    seed: int | torch.Generator = 0,
) -> None:
    """Set a model's parameters to the average of exact fits on subsets of the data.

    Every subset starts where the model is. Parameters with a constraint (variances,
    lengthscales) are averaged as the constraint transforms them back, positive ones
    geometrically; means arithmetically. Networks in front of a kernel are not
    averaged, as an average of networks is none: they stay as they are.

    Args:
        model: A ``gpytorch.models.ExactGP``; its parameters change in place.
        x: Training inputs (n, d). Default: the model's.
        y: Training targets (n,) or (n, t). Default: the model's.
        subsets: Number of subsets.
        size: Rows of each; up to 1,000 the fits are exact.
        kind: "neighbourhoods": the rows closest to a random one, which show short
            lengthscales; "random": rows drawn without replacement.
        steps: Steps of each fit.
        seed: Seed or generator of the subsets.

    Raises:
        ValueError: Data or settings do not fit; says which and why.

    References:
        Lin et al., NeurIPS 2023 (arXiv:2306.11589), appendix on hyperparameters.
    """
    check_count("subsets", subsets, 1)
    check_count("size", size, 2)
    check_count("steps", steps, 1)
    if kind not in ("neighbourhoods", "random"):
        raise ValueError(f"kind: expected 'neighbourhoods' or 'random', found {kind!r}")
    inputs, targets = training_data(model, x, y)
    layout = layout_of(model, inputs)
    joined = layout.join(inputs)
    observed = (~targets.isnan()).reshape(len(joined), -1).any(1).nonzero().squeeze(1)
    generator = generator_of(seed)
    if not any(learned_parameters(model)):
        raise ValueError(
            "model: expected parameters of kernels, means or noise that require a "
            "gradient, found 0"
        )
    totals: dict[str, Tensor] = {}
    for _ in range(subsets):
        count = min(size, len(observed))
        rows = observed[_subset(joined[observed], count, kind, generator)]
        part = _restricted(model, rows)
        subset = layout.split(joined[rows])
        with warnings.catch_warnings():  # a start need not be learned to its end
            warnings.filterwarnings("ignore", r"sgdgp.fit: The last \d+ steps")
            fit(part, subset, targets[rows], steps=steps, progress=False)
        for name, parameter, constraint in learned_parameters(part):
            value = to_average(parameter, constraint) / subsets
            totals[name] = totals.get(name, torch.zeros_like(value)) + value
    with torch.no_grad():
        for name, parameter, constraint in learned_parameters(model):
            parameter.copy_(from_average(totals[name], constraint))


initialize = initialise
"""The same in US spelling."""


def _subset(
    x: Tensor, size: int, kind: SubsetKind, generator: torch.Generator
) -> Tensor:
    """Indices (size,) of a random subset, or of a random row's neighbourhood."""
    if kind == "random":
        order = torch.randperm(len(x), generator=generator, device=generator.device)
        return order[:size].to(x.device)
    centre = int(
        torch.randint(len(x), (), generator=generator, device=generator.device)
    )
    distance = (x - x[centre]).square().sum(1)
    return distance.topk(size, largest=False).indices


def _restricted(model: ExactGP, rows: Tensor) -> ExactGP:
    """A copy of the model for some of the rows, its networks frozen."""
    data = [*(model.train_inputs or ()), model.train_targets]
    memo = {id(t): t for t in data if torch.is_tensor(t)}
    part = copy.deepcopy(model, memo=memo)
    if hasattr(part, "outcome_transform"):
        del part.outcome_transform  # the targets are in the model's units already
    likelihood = part.likelihood
    if isinstance(likelihood, gpytorch.likelihoods.FixedNoiseGaussianLikelihood):
        # Not that of the likelihood itself: it has what is learned beside in it.
        likelihood.noise_covar.noise = likelihood.noise_covar.noise[rows]
    averaged = {name for name, _, _ in learned_parameters(part)}
    for name, parameter in part.named_parameters():
        if name not in averaged:
            parameter.requires_grad_(False)
    return part
