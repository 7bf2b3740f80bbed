"""Pruning by uncertainty: which weights a network does without.

A weight goes by its magnitude |w|, by its signal-to-noise ratio |w| / s with s the
standard deviation of any posterior (Graves, Practical variational inference for neural
networks, NIPS 2011), by its precision 1 / s alone (which a weight has for being
determined, however large it is), or at random. The posterior may be of a network that
was trained plainly: ``linearise`` it, or start ``hmc`` there.

Deviations belong to the weights of one network, and to no permuted copy of it: the
posterior has to be in the frame of the network that is pruned.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from sgdgp.core.checks import check_number, check_variances
from sgdgp.core.errors import warn_user
from sgdgp.core.seeds import generator_of
from sgdgp.networks.sampling.compact import CompactGaussian, Network
from sgdgp.networks.sampling.symmetry import SymmetryGroup
from sgdgp.tangent.network import chosen_weights

Criterion: TypeAlias = Literal["signal_to_noise", "magnitude", "precision", "random"]
"""By what weights stay."""

_BY_POSTERIOR = ("signal_to_noise", "precision")

_IN_FRAME = 0.5
"""Least correlation of a network's weights with the means of a posterior around it:
draws around trained weights have .8 and more, those of a permuted copy none."""


def pruning_masks(
    network: nn.Module,
    sparsity: float,
    criterion: Criterion = "magnitude",
    *,
    posterior: CompactGaussian | None = None,
    group: SymmetryGroup | None = None,
    per_layer: bool = False,
    biases: bool = False,
    seed: int | torch.Generator = 0,
) -> dict[str, Bool[Tensor, ...]]:
    """Which weights stay, as ``torch.nn.utils.prune.custom_from_mask`` takes it.

    Args:
        network: To be pruned; it stays as it is.
        sparsity: Fraction of the weights that go, from 0 to 1, rounded to whole
            weights.
        criterion: "signal_to_noise", "magnitude", "precision" or "random".
        posterior: Whose deviations the first and third are by.
        group: The network's symmetries, by which the posterior is brought into its
            frame. Default: it is there.
        per_layer: Whether the same fraction of each tensor goes. Default: of all.
        biases: Whether biases and normalisations (tensors of one axis) go as well.
        seed: Of "random".

    Returns:
        Masks of the parameters that are pruned, by name.

    Raises:
        TypeError: An argument is of the wrong kind.
        ValueError: No such criterion, no posterior for it, or one of other weights.

    Warns:
        UserWarning: The posterior's means have little to do with the network's weights.
    """
    scores = _scores(network, criterion, posterior, group, biases, generator_of(seed))
    return _masks(scores, sparsity, per_layer)


def prune(
    network: Network,
    sparsity: float,
    criterion: Criterion = "magnitude",
    *,
    posterior: CompactGaussian | None = None,
    group: SymmetryGroup | None = None,
    per_layer: bool = False,
    biases: bool = False,
    seed: int | torch.Generator = 0,
) -> Network:
    """A copy of a network in which the least important weights are zero.

    Arguments and errors: as ``pruning_masks``.
    """
    scores = _scores(network, criterion, posterior, group, biases, generator_of(seed))
    return _pruned(network, _masks(scores, sparsity, per_layer))


def sparsity_curve(
    network: Network,
    evaluate: Callable[[Network], float],
    sparsities: Sequence[float],
    criterion: Criterion = "magnitude",
    *,
    posterior: CompactGaussian | None = None,
    group: SymmetryGroup | None = None,
    per_layer: bool = False,
    biases: bool = False,
    seed: int | torch.Generator = 0,
) -> list[tuple[float, float]]:
    """What is left of a network's worth at several sparsities.

    Args:
        network: As of ``pruning_masks``, as are all that follow the sparsities.
        evaluate: From a pruned network to a number, such as its test accuracy.
        sparsities: Fractions of the weights that go.
        criterion: See ``pruning_masks``.
        posterior: See there.
        group: See there.
        per_layer: See there.
        biases: See there.
        seed: See there.

    Returns:
        Pairs of a sparsity and the number.
    """
    scores = _scores(network, criterion, posterior, group, biases, generator_of(seed))
    found = []
    for sparsity in sparsities:
        pruned = _pruned(network, _masks(scores, sparsity, per_layer))
        found.append((float(sparsity), float(evaluate(pruned))))
    return found


@torch.no_grad()
def _scores(
    network: nn.Module,
    criterion: Criterion,
    posterior: CompactGaussian | None,
    group: SymmetryGroup | None,
    biases: bool,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Importance of each weight that may be pruned."""
    if criterion not in get_args(Criterion):
        raise ValueError(
            f"criterion: expected one of {', '.join(get_args(Criterion))}, found "
            f"{criterion!r}"
        )
    needed = criterion in _BY_POSTERIOR
    if needed and posterior is None:
        raise ValueError(
            f"posterior: {criterion!r} is by its deviations; give a CompactGaussian, "
            "such as CompactGaussian.of_posterior(linearise(network, ...).fit(...))"
        )
    if posterior is not None and not isinstance(posterior, CompactGaussian):
        raise TypeError(
            f"posterior: expected a CompactGaussian, found {type(posterior).__name__}; "
            "CompactGaussian.of(draws) or .of_posterior(posterior) makes one"
        )
    weights: dict[str, Tensor] = dict(chosen_weights(network, None))
    deviations: dict[str, Tensor] = {}
    if needed and posterior is not None:
        weights, deviations = _beside(network, posterior, group)
    prunable = {n: w for n, w in weights.items() if biases or w.ndim > 1}
    if not prunable:
        raise ValueError(
            "network: expected weights of two axes or more, found none; biases=True "
            "prunes others"
        )
    if criterion == "random":
        device = generator.device
        return {
            name: torch.rand(w.shape, generator=generator, device=device).to(w.device)
            for name, w in prunable.items()
        }
    if criterion == "magnitude":
        return {name: w.abs() for name, w in prunable.items()}
    if criterion == "precision":
        return {name: 1 / deviations[name] for name in prunable}
    return {name: w.abs() / deviations[name] for name, w in prunable.items()}


def _beside(
    network: nn.Module, posterior: CompactGaussian, group: SymmetryGroup | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of a network and their deviations under a posterior, by name."""
    names = posterior.names or tuple(chosen_weights(network, None))
    parameters = dict(network.named_parameters())
    if missing := [name for name in names if name not in parameters]:
        raise ValueError(
            f"posterior: it is of a network with a parameter {missing[0]!r}, which "
            f"{type(network).__name__} has not"
        )
    weights = {name: parameters[name].detach() for name in names}
    count = sum(w.numel() for w in weights.values())
    if count != len(posterior.mean):
        raise ValueError(
            f"posterior: expected one of {count} weights, found {len(posterior.mean)}"
        )
    check_variances("posterior", posterior.marginal_variance)
    flat = torch.cat([w.flatten() for w in weights.values()])
    if group is not None:
        posterior = posterior.aligned(flat, group)
    alike = torch.stack([flat, posterior.mean.to(flat)]).corrcoef()[0, 1]
    if float(alike) < _IN_FRAME:
        warn_user(
            f"posterior: the network's weights and its means correlate by "
            f"{float(alike):.2f}, so that its deviations are of another copy of the "
            "network (give group=SymmetryGroup.of(network)), or of another mode"
        )
    parts = posterior.standard_deviation.to(flat).split(
        [w.numel() for w in weights.values()]
    )
    deviations = {
        name: part.view_as(w)
        for (name, w), part in zip(weights.items(), parts, strict=True)
    }
    return weights, deviations


def _masks(
    scores: Mapping[str, Tensor], sparsity: float, per_layer: bool
) -> dict[str, Tensor]:
    """True where a weight stays; ties go in the order of the weights."""
    check_number("sparsity", sparsity)
    if not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity: expected a number from 0 to 1, found {sparsity}")
    if per_layer:
        return {n: _kept(s.flatten(), sparsity).view_as(s) for n, s in scores.items()}
    kept = _kept(torch.cat([s.flatten() for s in scores.values()]), sparsity)
    parts = kept.split([s.numel() for s in scores.values()])
    return {
        name: part.view_as(s)
        for (name, s), part in zip(scores.items(), parts, strict=True)
    }


def _kept(scores: Float[Tensor, " n"], sparsity: float) -> Bool[Tensor, " n"]:
    gone = scores.argsort(stable=True)[: round(sparsity * len(scores))]
    kept = torch.ones_like(scores, dtype=torch.bool)
    kept[gone] = False
    return kept


@torch.no_grad()
def _pruned(network: Network, masks: Mapping[str, Tensor]) -> Network:
    found = copy.deepcopy(network)
    parameters = dict(found.named_parameters())
    for name, mask in masks.items():
        parameters[name].mul_(mask)
    return found
