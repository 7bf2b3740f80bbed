"""Gaussians and optima found by descent: mean-field posteriors, and deep ensembles.

Mean field (Blundell et al., Weight uncertainty in neural networks, ICML 2015): of
q = N(m, diag(s^2)) the one with the least KL(q || p(w | data)), that is the largest

    E_q[-U(w)] + sum_i log s_i + constant,

whose gradients are, with w = m + s e and g the gradient of U at w, E[g] in m and
E[s e g] - 1 in log s. What the prior adds is exact where it is diagonal, what the data
add is by draws of e and batches. A Gaussian posterior of precision A has m at its mean
and s_i^2 = 1 / A_ii: the variance of a weight *given the others*, less than its
marginal one.

A deep ensemble is some optima of U from starts of their own, trained side by side.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_followers,
    check_matrix,
    check_positive,
)
from sgdgp.core.seeds import generator_of, standard_normal
from sgdgp.networks.potential import Potential, check_potential
from sgdgp.networks.sampling.compact import CompactGaussian
from sgdgp.networks.sampling.draws import Draws
from sgdgp.networks.stream import Batch
from sgdgp.tangent import Tangent

StepCallback: TypeAlias = Callable[[int, float], bool | None]
"""Called with the step and the loss; returning True stops the descent."""

_CHECKED_BY, _CHECKED_NUMBERS = 64, 4096
"""Draws that say whether a fit has converged, and numbers in all of them: few weights
have more draws."""

_STEPS_DOWN = (1.0, 0.1, 0.01, 0.001)
"""Lengths of steps that may not help an optimum, relative to its weights."""

_GAIN, _NATS = 0.01, 0.1
"""Most that they help: part of the potential, or so many nats."""

_CONVERGED = 0.1
"""Deviations that means may be off, and relative error of the deviations' precision."""


@torch.no_grad()
def mean_field(
    potential: Potential,
    *,
    steps: int = 3000,
    learning_rate: float = 1e-2,
    samples: int = 2,
    init_scale: float = 0.05,
    start: Float[Tensor, " D"] | None = None,
    seed: int | torch.Generator = 0,
    progress: bool | None = None,
    callback: StepCallback | None = None,
) -> CompactGaussian:
    """The Gaussian of independent weights that is closest to the posterior.

    By Adam, whose learning rate falls to zero along a cosine, on batches as the
    potential's loader makes them. Whether it has converged is measured at the end with
    64 draws (of few weights more) on all data, and said in ``warnings``.

    Args:
        potential: Of the network.
        steps: Batches.
        learning_rate: Of the means and of the logarithms of the deviations.
        samples: Draws of each step; two are a pair of opposite signs, which takes the
            noise off the means as far as the potential is quadratic.
        init_scale: First standard deviation of every weight.
        start: First means. Default: the network's weights.
        seed: Of draws and batches.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called with the step and minus its bound (a noisy number of nats, but
            for a constant); returning True stops the descent.

    Returns:
        Means and (conditional) deviations.

    Raises:
        FloatingPointError: The descent has diverged.
        TypeError: An argument is of the wrong kind.
        ValueError: One does not fit; says which and why.
    """
    check_potential(potential)
    check_count("samples", samples, 1)
    check_positive("init_scale", init_scale)
    theta, prior = potential.theta, potential.prior
    if start is not None:
        if not isinstance(start, Tensor) or start.shape != theta.shape:
            found = tuple(start.shape) if isinstance(start, Tensor) else repr(start)
            raise ValueError(
                f"start: expected a tensor of shape {tuple(theta.shape)}, found {found}"
            )
        check_finite("start", start)
    mean = (theta if start is None else start.to(theta)).clone()
    log_scale = torch.full_like(mean, init_scale).log()
    generator = generator_of(seed)
    precision = None
    if prior.is_diagonal:
        precision = prior.matmul(torch.ones_like(mean)[:, None])[:, 0]
    centre = torch.zeros_like(mean) if potential.mean is None else potential.mean

    def draws(count: int) -> Float[Tensor, "k D"]:
        return standard_normal(count, len(mean), like=mean, generator=generator)

    def slopes(
        noise: Float[Tensor, "k D"], batch: Batch | None
    ) -> tuple[Tensor, Float[Tensor, "k D"], Float[Tensor, "k D"]]:
        """Loss, and gradients in m and log s, of each of some draws."""
        scale = log_scale.exp()
        losses, gradient = potential.value_and_gradient(mean + scale * noise, batch)
        along = scale * noise * gradient - 1
        if precision is not None:
            # The prior's share by its expectation.
            deviation = scale * noise
            pull = precision * (mean - centre)
            gradient = gradient - precision * deviation
            along = along - (pull + precision * deviation) * deviation
            along = along + precision * scale.square()
        return losses - log_scale.sum(), gradient, along

    def step(batch: Batch | None) -> tuple[Tensor, list[Tensor]]:
        noise = draws(-(-samples // 2))
        noise = torch.cat([noise, -noise])[:samples]
        losses, in_mean, in_scale = slopes(noise, batch)
        return losses.mean(), [in_mean.mean(0), in_scale.mean(0)]

    reached = _descend(
        "mean field",
        potential,
        [mean, log_scale],
        step,
        steps=steps,
        learning_rate=learning_rate,
        generator=generator,
        progress=progress,
        callback=callback,
    )
    checked = max(_CHECKED_BY, _CHECKED_NUMBERS // len(mean))
    _, in_mean, in_scale = slopes(draws(checked), None)
    warnings = _doubts(reached, steps, log_scale.exp() * in_mean, in_scale)
    return CompactGaussian(
        mean,
        log_scale.mul(2).exp(),
        mean.new_zeros(len(mean), 0),
        potential.tangent.names,
        "conditional",
        warnings,
    )


@torch.no_grad()
def ensemble(
    potential: Potential,
    members: int = 5,
    *,
    steps: int = 2000,
    learning_rate: float = 1e-2,
    start: Float[Tensor, "members D"] | None = None,
    seed: int | torch.Generator = 0,
    progress: bool | None = None,
    callback: StepCallback | None = None,
) -> Draws:
    """Networks trained to optima of the potential from starts of their own.

    By Adam as ``mean_field``, all in one batched tensor. Whether they are optima is
    measured at the end, and said in ``warnings``. Chains of ``hmc`` can start from
    them: ``hmc(potential, start=ensemble(potential).flat)``.

    Args:
        potential: Of the network.
        members: Networks.
        steps: Batches.
        learning_rate: Of Adam at first.
        start: Weights to start from. Default: as the layers' ``reset_parameters``
            initialise them.
        seed: Of starts and batches.
        progress: Show a progress bar. Default: on a terminal.
        callback: Called with the step and the mean potential (by its batch); returning
            True stops the descent.

    Returns:
        The networks, one draw of each "chain", with their potentials as energies.

    Raises:
        FloatingPointError: The descent has diverged.
        TypeError: An argument is of the wrong kind.
        ValueError: One does not fit, or a layer cannot be initialised; says which.
    """
    check_potential(potential)
    check_count("members", members, 1)
    tangent, generator = potential.tangent, generator_of(seed)
    if start is None:
        weights = _initialised(tangent, members, generator)
    else:
        check_matrix("start", start, tangent.num_weights)
        if len(start) != members:
            raise ValueError(
                f"start: expected {members} rows, one for each member, found "
                f"{len(start)}"
            )
        weights = start.to(potential.theta).clone()
    check_finite("start", weights)
    began = time.perf_counter()

    def step(batch: Batch | None) -> tuple[Tensor, list[Tensor]]:
        values, gradient = potential.value_and_gradient(weights, batch)
        return values.mean(), [gradient]

    reached = _descend(
        "ensemble",
        potential,
        [weights],
        step,
        steps=steps,
        learning_rate=learning_rate,
        generator=generator,
        progress=progress,
        callback=callback,
    )
    stopped = (f"Stopped after {reached} of {steps} steps.",) if reached < steps else ()
    energies, doubts = _above_optima(potential, weights)
    return Draws(
        weights.unsqueeze(1),
        tangent.names,
        tangent.shapes,
        energies=energies.unsqueeze(1),
        num_gradients=reached * members,
        seconds=time.perf_counter() - began,
        warnings=("Members of an ensemble: optima, not draws.", *stopped, *doubts),
    )


def _descend(
    title: str,
    potential: Potential,
    parameters: Sequence[Tensor],
    gradients: Callable[[Batch | None], tuple[Tensor, Sequence[Tensor]]],
    *,
    steps: int,
    learning_rate: float,
    generator: torch.Generator,
    progress: bool | None,
    callback: StepCallback | None,
) -> int:
    """Move the parameters in place; how many steps were made."""
    check_count("steps", steps, 1)
    check_positive("learning_rate", learning_rate)
    check_followers(progress, callback)
    optimizer = torch.optim.Adam(parameters, learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    hidden = None if progress is None else not progress
    batches = _batches(potential, generator)
    with tqdm(total=steps, desc=title, unit="step", disable=hidden) as bar:
        for number in range(steps):
            value, slopes = gradients(next(batches))
            loss = float(value)
            finite = all(bool(slope.isfinite().all()) for slope in slopes)
            if not finite or not abs(loss) < float("inf"):
                raise FloatingPointError(
                    f"{title}: diverged at step {number + 1} of {steps}; give a "
                    f"learning_rate below {learning_rate:g}"
                )
            for parameter, slope in zip(parameters, slopes, strict=True):
                parameter.grad = slope
            optimizer.step()
            schedule.step()
            bar.update()
            if callback is not None and callback(number + 1, loss):
                return number + 1
    return steps


def _batches(
    potential: Potential, generator: torch.Generator
) -> Iterator[Batch | None]:
    """Batches in random order without end; None, all data, where there is one."""
    stream = potential.stream
    while True:
        if stream.num_batches < 2:
            yield None
        else:
            yield from stream.shuffled(generator)


def _doubts(
    reached: int,
    steps: int,
    in_mean: Float[Tensor, "k D"],
    in_scale: Float[Tensor, "k D"],
) -> tuple[str, ...]:
    """Whether a mean-field fit is at its optimum, by gradients at draws.

    A mean that is d deviations off has a gradient of d per deviation, and a variance
    times (1 + d) one of d in its logarithm: their squares are what the mean over draws
    has beyond its own variance, and what that varies by over few weights.
    """
    found = [f"Stopped after {reached} of {steps} steps."] if reached < steps else []
    errors = []
    for slopes in (in_mean, in_scale):
        noise = float(slopes.var(0).mean()) / len(slopes)
        excess = float(slopes.mean(0).square().mean()) - noise
        chance = 3 * noise * (2 / slopes.shape[1]) ** 0.5
        errors.append(excess**0.5 if excess > chance + _CONVERGED**2 else 0.0)
    if any(errors):
        found.append(
            f"The mean-field fit has not converged: means are off by {errors[0]:.2g} "
            f"of their standard deviations, variances by {errors[1]:.2g} of themselves "
            f"(root mean squares), expected at most {_CONVERGED}. Give more steps, or "
            "more samples."
        )
    return tuple(found)


def _above_optima(
    potential: Potential, weights: Float[Tensor, "k D"]
) -> tuple[Float[Tensor, " k"], tuple[str, ...]]:
    """U of each network, and a warning of those that a single step still lowers."""
    energies, slopes = potential.value_and_gradient(weights)
    tiny = torch.finfo(weights.dtype).tiny
    down = slopes / torch.linalg.vector_norm(slopes, dim=1, keepdim=True).clamp_min(
        tiny
    )
    size, least = torch.linalg.vector_norm(weights, dim=1, keepdim=True), energies
    for part in _STEPS_DOWN:
        least = torch.fmin(least, potential(weights - part * size * down))
    gain = energies - least
    far = gain > (_GAIN * energies.abs()).clamp_min(_NATS)
    if not bool(far.any()):
        return energies, ()
    return energies, (
        f"{int(far.sum())} of {len(far)} members are no optima: one step down the "
        f"gradient lowers the potential of one by {float(gain[far][0]):.3g} nats, from "
        f"{float(energies[far][0]):.4g}. Give more steps, or another learning_rate.",
    )


def _initialised(
    tangent: Tangent, count: int, generator: torch.Generator
) -> Float[Tensor, "k D"]:
    """Weights of new networks, as their layers initialise them.

    Raises:
        ValueError: A layer cannot; names it.
    """
    network = copy.deepcopy(tangent.network)
    chosen = {n: p for n, p in network.named_parameters() if n in tangent.slices}
    held = {id(parameter) for parameter in chosen.values()}
    layers = []
    for name, module in network.named_modules():
        if any(id(p) in held for p in module.parameters(recurse=False)):
            if not callable(getattr(module, "reset_parameters", None)):
                raise ValueError(
                    f"network: layer {name!r} ({type(module).__name__}) has no "
                    "reset_parameters to initialise it anew; give start="
                )
            layers.append(module)
    rows = []
    device = generator.device
    seeds = torch.randint(2**62, (count,), generator=generator, device=device)
    for seed in seeds.tolist():
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in layers:
                layer.reset_parameters()
        rows.append(torch.cat([chosen[n].detach().flatten() for n in tangent.names]))
    return torch.stack(rows)
