"""Learn a model's parameters in place: the usual training loop, with its comforts."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from tqdm.auto import tqdm

from sgdgp.core.checks import (
    check_count,
    check_finite_parameters,
    check_followers,
    check_positive,
)
from sgdgp.core.deprecation import renamed_arguments
from sgdgp.core.errors import warn_user
from sgdgp.core.inference import with_gradients
from sgdgp.core.seeds import derived_generator, generator_of, seed_of
from sgdgp.gpytorch_adapter import Inputs, has_fixed_noise, training_data
from sgdgp.solvers.base import Solver
from sgdgp.training.evidence import total_log_likelihood
from sgdgp.training.fit_checkpoint import FitCheckpoint
from sgdgp.training.gradient import EXACT_ROWS
from sgdgp.training.marginal_likelihood import StochasticMarginalLogLikelihood
from sgdgp.training.parameters import (
    images_of,
    moved_by_optimiser,
    put_state,
    scatter,
    state_of,
)
from sgdgp.training.probes import Probes
from sgdgp.training.run import (
    FitCallback,
    FitEntry,
    FitLimits,
    FitReason,
    Fitted,
    Plateau,
    Run,
)

_POOR_RESIDUAL = 0.3
"""Relative residual of the last solve from which a fit warns that it was cut short."""

_LATE_STEPS, _LATE_GAIN = 10, 0.05
"""Gain of log p(y | X) / n over the last steps from which a fit warns that it was
ended too early: fifty times a plateau's."""

_MANY_ROWS = 3_000
"""Above, a fit starts on some of its rows: all of them are dear."""

_SHARE = 3
"""Of the steps that a fit would make on all rows, such a fit makes one in so many."""

_SHOWN = 4
"""Parameters beside the progress bar, which have to fit into a line."""


def adam(parameters: Iterable[torch.nn.Parameter]) -> Optimizer:
    """Adam with learning rate 0.1, the optimiser of GPyTorch's tutorials."""
    return torch.optim.Adam(parameters, lr=0.1)


@renamed_arguments(optimiser="optimizer", every="checkpoint_every")
@with_gradients
def fit(
    model: ExactGP,
    x: Inputs | None = None,
    y: Float[Tensor, " n"] | Float[Tensor, "n t"] | None = None,
    *,
    steps: int = 100,
    optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer] = adam,
    solver: Solver | str = "auto",
    probes: Probes | str = "auto",
    tolerance: float | None = None,
    passes_per_step: float = 10.0,
    max_passes: float | None = None,
    max_seconds: float | None = None,
    plateau: Plateau | None = Plateau(),  # noqa: B008 (frozen)
    restarts: int = 0,
    seed: int | torch.Generator = 0,
    operator: str = "auto",
    memory_budget: int | None = None,
    progress: bool | None = None,
    callback: FitCallback | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | float = 60,
) -> Fitted:
    """Learn kernel, mean and noise by stochastic marginal-likelihood gradients.

    The parameters of ``model`` and ``model.likelihood`` change in place, those with
    ``requires_grad`` and within their constraints; priors are respected. Solves are
    warm-started and stop at a budget: over the steps their residuals fall all the
    same. See docs/hyperparameters.md for what that buys.

    A fit of more than 3,000 rows makes its steps on 1,000 random ones first, by exact
    gradients, and then up to a third as many on all of them, which are those of the
    history; not where ``probes`` are given, or a target is missing.

    Args:
        model: A ``gpytorch.models.ExactGP`` with a Gaussian likelihood.
        x: Training inputs (n, d) before the model's own transforms. Default: the
            model's.
        y: Training targets (n,), or (n, t) for several outputs. Default: the model's.
        steps: Most steps of the optimiser; those that led down are made again.
        optimizer: Parameters to an optimiser. Default: Adam with learning rate 0.1.
        solver: A solver, its name, or "auto".
        probes: ``PathwiseProbes``, ``StandardProbes``, or "auto": exact gradients up
            to 1,000 rows, else standard probes.
        tolerance: Relative residual that ends a step's solve. Default: 0.01, or that of
            the solver where ``solver`` is not a name.
        passes_per_step: Budget of a step's solve in passes over K.
        max_passes: Budget of all steps. Default: none.
        max_seconds: Budget of all steps in seconds; a solve that it cuts short leaves
            a gradient to be formed, about a pass. Default: none.
        plateau: When to stop early; None for never.
        restarts: Further fits from scattered parameters (``parameters.scatter``); the
            model gets the best one's by the estimated log marginal likelihood.
        seed: Seed or generator of the probes and restarts.
        operator: "auto", "dense", "tiled", "triton", "triton_medium", "keops",
            "row_blocks", "features" or "sharded" (see ``sgdgp.distribute``).
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.
        progress: Show a progress bar with the parameters. Default: on a terminal.
        callback: Called after every step; returning True stops the fit.
        checkpoint: File that keeps the fit, also when Ctrl-C or an error ends it.
            Calling again with the same model, data and settings goes on from there; an
            ended fit is returned at once.
        checkpoint_every: Seconds between two writes of it, at least.

    Returns:
        How it went. The learned parameters are in the model, which is left in the
        mode (train or eval) in which it was.

    Raises:
        UnsupportedModelError: The prior is not a function of two points.
        CheckpointError: The checkpoint cannot be written, is damaged, or belongs to
            another fit (a ValueError).
        TypeError: Data, settings or the likelihood are of the wrong kind.
        ValueError: Data, parameters or settings do not fit; says which and why.

    Example:
        >>> sgdgp.fit(model, steps=100)
        >>> posterior = sgdgp.condition(model)
    """
    check_count("steps", steps, 1)
    if max_passes is not None:
        check_positive("max_passes", max_passes)
    if max_seconds is not None:
        check_positive("max_seconds", max_seconds)
    if plateau is not None and not isinstance(plateau, Plateau):
        raise TypeError(f"plateau: expected a Plateau or None, found {plateau!r}")
    check_count("restarts", restarts, 0)
    check_followers(progress, callback)
    x, y = training_data(model, x, y)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("model: expected parameters that require a gradient, found 0")
    if any(parameter.is_inference() for parameter in parameters):
        raise ValueError("model: expected one built outside torch.inference_mode()")
    check_finite_parameters("model", model)
    number = seed_of(generator_of(seed))
    rows = _first_rows(model, y, number) if probes == "auto" else None
    most = steps if rows is None else math.ceil(steps / _SHARE)
    limits = FitLimits(most, max_passes, max_seconds, plateau)

    def start() -> Run:
        mll = StochasticMarginalLogLikelihood(
            model.likelihood,
            model,
            solver=solver,
            probes=probes,
            tolerance=tolerance,
            passes_per_evaluation=passes_per_step,
            initial_value=0.0,
            seed=number,
            operator=operator,
            memory_budget=memory_budget,
        )
        images = images_of(model)
        built = _built(optimizer, moved_by_optimiser(parameters, images))
        # One that was made of the model's own parameters moves those.
        held = {id(p) for group in built.param_groups for p in group["params"]}
        images = [image for image in images if id(image.leaf) in held]
        moved = moved_by_optimiser(parameters, images)
        return Run(model, mll, built, moved, images)

    def attempt(i: int, earlier: Sequence[Fitted]) -> Fitted:
        place = checkpoint if i == 0 or checkpoint is None else f"{checkpoint}.{i}"
        keeper = FitCheckpoint.at(place, checkpoint_every)
        with fit_bar(progress, most, callback) as shown:
            left = limits.after(earlier)
            return _fitted(start(), x, y, left, shown, keeper, rows)

    with in_train_mode(model):
        found = best_of(restarts + 1, attempt, model, x, y, number)
    if found.warnings:
        warn_user("sgdgp.fit: " + " ".join(found.warnings))
    return found


def _fitted(
    run: Run,
    x: Inputs,
    y: Tensor,
    limits: FitLimits,
    callback: FitCallback | None,
    keeper: FitCheckpoint | None,
    rows: Tensor | None,
) -> Fitted:
    """One fit from where the model is, or from where its checkpoint was."""
    reason = None if keeper is None else keeper.open_for(run, x, y)
    if reason is None:
        if rows is not None and not (run.history or run.first_steps):
            _start_on(rows, run, x, y, limits)
        try:
            reason = run.go(x, y, limits, callback, keeper.keep if keeper else None)
        except BaseException:
            # Ctrl-C, or an error in a callback.
            if keeper is not None and run.history:
                keeper.close(run, "interrupted")
            raise
        if keeper is not None:
            keeper.close(run, reason)
    run.settle(x, y)
    # GPyTorch's modules refer to themselves: what they hold waits for the collector.
    run.mll.forget()
    return Fitted(
        reason=reason,
        steps=len(run.history),
        passes=run.mll.passes,
        seconds=run.seconds,
        history=tuple(run.history),
        warnings=_warnings(run, reason),
        first_steps=run.first_steps,
    )


def _first_rows(model: ExactGP, y: Tensor, seed: int) -> Tensor | None:
    """Rows that a fit makes its first steps on; None where those are all of them."""
    if len(y) <= _MANY_ROWS or has_fixed_noise(model.likelihood) or y.isnan().any():
        return None
    count = EXACT_ROWS // (y.shape[1] if y.ndim == 2 else 1)
    generator = derived_generator(seed, "first rows")
    order = torch.randperm(len(y), generator=generator, device=generator.device)
    return order[:count].to(y.device)


def _start_on(rows: Tensor, run: Run, x: Inputs, y: Tensor, limits: FitLimits) -> None:
    """Make the first steps on some rows, of which nothing is told.

    The optimiser is the same: with moments of its own it would leave at full speed
    the place that was found.
    """
    seconds = limits.max_seconds
    some = replace(
        limits,
        steps=_SHARE * limits.steps,
        max_seconds=None if seconds is None else 0.5 * seconds,
    )
    part = x[rows] if torch.is_tensor(x) else tuple(column[rows] for column in x)
    run.go(part, y[rows], some, None, None)
    run.first_steps, run.last_step = len(run.history), 0.0
    run.history.clear()
    run.best = []


@contextmanager
def in_train_mode(model: torch.nn.Module) -> Iterator[None]:
    """Put a model into train mode, and back into the mode in which it was."""
    modes = [(module, module.training) for module in model.modules()]
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        for module, mode in modes:  # a part may have been in another one
            module.training = mode


def _built(
    optimizer: Callable[[Iterable[torch.nn.Parameter]], Optimizer],
    parameters: Sequence[torch.nn.Parameter],
) -> Optimizer:
    if not callable(optimizer):
        raise TypeError(
            "optimizer: expected a function of the parameters, such as "
            f"torch.optim.Adam, found {optimizer!r}"
        )
    built = optimizer(parameters)
    if not isinstance(built, Optimizer) or isinstance(built, torch.optim.LBFGS):
        raise TypeError(
            "optimizer: expected one that steps along a stochastic gradient, such as "
            f"torch.optim.Adam, found {type(built).__name__}"
        )
    return built


def _warnings(run: Run, reason: FitReason) -> tuple[str, ...]:
    sentences = []
    if reason == "diverged":
        sentences.append(
            "The fit diverged again and again although the learning rate was halved "
            f"{run.recoveries} times; the model holds the last good parameters. Start "
            "with a smaller learning rate, or give the noise a larger lower bound."
        )
    elif run.recoveries:
        sentences.append(
            "The fit diverged and went on from the last good parameters with half the "
            f"learning rate; number of times: {run.recoveries}."
        )
    if reason in ("steps", "budget") and len(run.history) >= _LATE_STEPS:
        late = run.history[-_LATE_STEPS:]
        gain = late[-1].value - late[0].value
        if gain > _LATE_GAIN:
            sentences.append(
                f"The last {_LATE_STEPS} steps still gained {gain:.2f} in log p / n: "
                "the parameters are not learned yet. Give it more steps, or more time."
            )
    if run.problem is not None:
        sentences.append(run.problem)
    residual = run.history[-1].residual if run.history else 0.0
    if residual > _POOR_RESIDUAL:
        sentences.append(
            f"The last step's solve ended with a relative residual of {residual:.2f}: "
            "gradients are biased. Give it more passes (passes_per_step)."
        )
    return tuple(sentences)


def best_of(
    count: int,
    attempt: Callable[[int, Sequence[Fitted]], Fitted],
    model: ExactGP,
    x: Inputs,
    y: Tensor,
    seed: int,
) -> Fitted:
    """Fit ``count`` times, from where the model is and from scattered parameters.

    Args:
        count: Number of fits; with one, nothing is compared.
        attempt: (number of the fit, the earlier ones) to a fit, which changes the
            model in place.
        model: It ends with the best fit's parameters, by the estimated log marginal
            likelihood.
        x: Training inputs.
        y: Targets in the model's units.
        seed: Seed of the scattered parameters and of the estimates.

    Returns:
        The best fit, its passes and seconds those of all.
    """
    if count == 1:
        return attempt(0, ())
    start = state_of(model)
    runs: list[Fitted] = []
    values: list[float] = []
    states: list[dict[str, Tensor]] = []
    for i in range(count):
        if i:
            put_state(model, start)
            scatter(model, derived_generator(seed, "restart", i))
        runs.append(attempt(i, runs))
        states.append(state_of(model))
        values.append(_value(model, x, y, seed))
        if runs[-1].reason in ("interrupted", "budget"):
            break
    chosen = max(range(len(runs)), key=values.__getitem__)
    put_state(model, states[chosen])
    return replace(
        runs[chosen],
        passes=sum(run.passes for run in runs),
        seconds=sum(run.seconds for run in runs),
    )


def _value(model: ExactGP, x: Inputs, y: Tensor, seed: int) -> float:
    """The estimated log marginal likelihood; of parameters without one, minus infinity.

    A fit that diverged may have left such parameters.
    """
    try:
        value = total_log_likelihood(model, x, y, seed=seed).value
    except (torch.linalg.LinAlgError, ValueError):
        return -math.inf
    return value if math.isfinite(value) else -math.inf


@contextmanager
def fit_bar(
    show: bool | None, steps: int, callback: FitCallback | None
) -> Iterator[FitCallback | None]:
    """Wrap a callback so that it also moves a bar; by default only on a terminal."""
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield callback
        return
    with tqdm(desc="fit", total=steps, unit="step") as bar:

        def moved(entry: FitEntry) -> bool | None:
            bar.update(entry.step + 1 - bar.n)
            bar.set_postfix_str(
                f"{describe(entry.parameters)}, residual {entry.residual:.0e}"
            )
            return None if callback is None else callback(entry)

        yield moved


def describe(parameters: Mapping[str, tuple[float, ...]]) -> str:
    """The first parameters in a few characters: a value, or smallest to largest."""
    parts = []
    for path, values in list(parameters.items())[:_SHOWN]:
        name = path.rpartition(".")[2]
        low, high = min(values), max(values)
        span = f"{low:.3g}" if len(values) == 1 else f"{low:.2g}..{high:.2g}"
        parts.append(f"{name} {span}")
    return ", ".join(parts)
