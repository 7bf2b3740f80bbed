"""Thompson sampling: propose the maxima of sample functions, observe, condition."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Literal, TypeAlias

import torch
from gpytorch.models import ExactGP
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sgdgp.bayesopt.maximise import check_bounds, maximise
from sgdgp.bayesopt.posteriors import Chain, Maximiser, ModelMaker, Options
from sgdgp.bayesopt.record import (
    Pending,
    Record,
    RunCheckpoint,
    Step,
    posterior_file,
    remove_posterior,
)
from sgdgp.core.checkpoint import check_every
from sgdgp.core.checks import (
    check_count,
    check_finite,
    check_followers,
    check_matrix,
    check_positive,
    check_same,
)
from sgdgp.core.hashes import digest
from sgdgp.core.inference import outside_inference_mode
from sgdgp.core.seeds import derived_generator, number_of
from sgdgp.posterior import PathwisePosterior
from sgdgp.posterior.problem import DEFAULT_FEATURES
from sgdgp.solvers.auto import check_solver_name
from sgdgp.solvers.base import Solver

Objective: TypeAlias = Callable[[Tensor], Tensor]
"""Points (b, d) to values (b,); larger is better."""


@dataclass(frozen=True, eq=False)
class Result:
    """What a run found.

    Attributes:
        x: All observed points (n, d), the initial ones first.
        y: Their values (n,).
        history: One entry for every step.
        reason: "finished", or "stopped" by the callback.
        posterior: The posterior that proposed the last batch, not yet given its
            values; None where this call proposed none.
    """

    x: Float[Tensor, "n d"] = field(repr=False)
    y: Float[Tensor, " n"] = field(repr=False)
    history: tuple[Step, ...] = field(repr=False)
    reason: Literal["finished", "stopped"]
    posterior: PathwisePosterior | None = field(repr=False)

    @property
    def best_x(self) -> Float[Tensor, " d"]:
        """The point with the largest value."""
        return self.x[self.y.argmax()]

    @property
    def best_y(self) -> float:
        """The largest value."""
        return float(self.y.max())


@outside_inference_mode
def thompson_sampling(
    objective: Objective,
    bounds: Float[Tensor, "2 d"],
    initial: int | tuple[Float[Tensor, "n d"], Float[Tensor, " n"]],
    steps: int,
    batch: int,
    *,
    model: ExactGP | ModelMaker | None = None,
    solver: Solver | str = "auto",
    maximiser: Maximiser = functools.partial(maximise, progress=False),  # noqa: B008
    refit_every: int | None = None,
    redraw_every: int | None = None,
    noise: float | None = None,
    num_features: int = DEFAULT_FEATURES,
    evaluate_at_once: int | None = None,
    callback: Callable[[Step], bool | None] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int | float = 0,
    seed: int | torch.Generator = 0,
    memory_budget: int | None = None,
    progress: bool | None = None,
) -> Result:
    """Maximise an objective by Thompson sampling with ``batch`` points at a time.

    In every step each of ``batch`` posterior functions proposes its maximum, the
    proposals are evaluated, and the functions conditioned on the results.

    Args:
        objective: Points (b, d) to values (b,), noisy or not; larger is better.
        bounds: Lower and upper corner of the box (2, d).
        initial: Observations (n, d) and (n,) to begin with; or a number of points to
            draw uniformly and evaluate first.
        steps: Steps in all, those of earlier calls with the same checkpoint included.
        batch: Functions, and so points in each step.
        model: A GPyTorch model whose parameters are right already; or a function of
            the data that makes one. Default: a Matern-5/2 kernel with a lengthscale
            for each input, learned from up to 1,000 of the initial observations.
        solver: A solver, its name, or "auto".
        maximiser: How functions are maximised, such as
            ``functools.partial(sgdgp.bayesopt.maximise, rounds=10)``.
        refit_every: Steps after which the model learns again. Default: never.
        redraw_every: Steps after which functions are drawn anew. Default: never; the
            same functions are conditioned on and on, which is ensemble sampling (Lu
            & Van Roy, 2017), and every solve starts from the one before. With 1 all
            steps have independent functions, as in the papers, and only the solve of
            the mean starts from the one before.
        noise: Noise variance of new observations. Default: the likelihood's.
        num_features: Random features of the prior draws.
        evaluate_at_once: Points given to the objective at a time. Default: all.
        callback: Called after every step; returning True stops the run.
        checkpoint: File that keeps the run (with ".posterior" behind its name: its
            functions). Calling again with it goes on where the run was, whatever
            ended it: proposals are written before they are evaluated, results right
            after. Only a call of the objective that was under way is made again.
        checkpoint_every: Seconds between two writes of results, at least; so much may
            have to be evaluated again. Default: all are written at once.
        seed: Seed or generator of everything random.
        memory_budget: Bytes that operator and solver may use. Default: half of what
            is free.
        progress: Show a progress bar. Default: on a terminal.

    Returns:
        All observations, the best of them, and what each step took.

    Raises:
        CheckpointError: The checkpoint cannot be written, is damaged, or belongs to
            another run (a ValueError).
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit, or the objective returned something that
            is no value; nothing of that call has entered the data.

    Example:
        >>> result = sgdgp.bayesopt.thompson_sampling(
        ...     objective, bounds, initial=1000, steps=10, batch=100,
        ...     checkpoint="run.safetensors",
        ... )
        >>> result.best_x, result.best_y
    """
    check_bounds(bounds)
    check_count("steps", steps, 0)
    check_count("batch", batch, 1)
    for name, value in (
        ("refit_every", refit_every),
        ("redraw_every", redraw_every),
        ("evaluate_at_once", evaluate_at_once),
    ):
        if value is not None:
            check_count(name, value, 1)
    if checkpoint_every != 0:
        check_every(checkpoint_every)
    if noise is not None:
        check_positive("noise", noise)
    if model is not None and not isinstance(model, ExactGP) and not callable(model):
        raise TypeError(
            "model: expected an ExactGP, a function of the data or None, found "
            f"{model!r}"
        )
    for name, function in (("objective", objective), ("maximiser", maximiser)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function, found {function!r}")
    check_solver_name(solver)
    check_followers(progress, callback)
    seed = number_of(seed)
    options = Options(
        batch=batch,
        model=model,
        solver=solver,
        maximiser=maximiser,
        refit_every=refit_every,
        redraw_every=redraw_every,
        noise=noise,
        num_features=num_features,
        evaluate_at_once=evaluate_at_once,
        seed=seed,
        memory_budget=memory_budget,
    )
    settings = {
        "bounds": digest(bounds),
        "initial": digest(initial),
        "batch": str(batch),
        "seed": str(seed),
        "noise": str(noise),
        "refit_every": str(refit_every),
        "redraw_every": str(redraw_every),
        "num_features": str(num_features),
    }
    keeper, record = None, None
    if checkpoint is not None:
        keeper = RunCheckpoint(checkpoint, checkpoint_every)
        record = keeper.open_for(settings, bounds.shape[1], bounds.device)
    if record is None:
        record = _beginning(bounds, initial, seed)
        if keeper is not None:
            # What an earlier run left must not be taken for this one's.
            remove_posterior(posterior_file(keeper.path))
            keeper.keep(record)
    run = Run(objective, bounds, options, record, keeper)
    return run.until(steps, callback, progress)


def _beginning(
    bounds: Tensor, initial: int | tuple[Tensor, Tensor], seed: int
) -> Record:
    """The record of a run that has observed nothing yet."""
    if isinstance(initial, tuple):
        x, y = initial
        check_matrix("initial[0]", x, bounds.shape[1])
        check_same("initial[0]", x, "bounds", bounds)
        if y.shape != (len(x),):
            raise ValueError(
                f"initial[1]: expected shape ({len(x)},), found {tuple(y.shape)}"
            )
        check_same("initial[1]", y, "bounds", bounds)
        check_finite("initial[0]", x)
        check_finite("initial[1]", y)
        return Record(x.detach(), y.detach())
    if not isinstance(initial, Integral):
        raise TypeError(
            "initial: expected a number of points, or a tuple (x, y) of tensors, found "
            f"{type(initial).__name__}"
        )
    check_count("initial", initial, 1)
    generator = derived_generator(seed, "initial")
    uniform = torch.rand(
        initial,
        bounds.shape[1],
        generator=generator,
        device=generator.device,
        dtype=torch.float64,
    )
    proposals = bounds[0] + (bounds[1] - bounds[0]) * uniform.to(bounds)
    none = bounds.new_zeros(0)
    pending = Pending(Step(0, 0, float("nan")), proposals, none)
    return Record(bounds.new_zeros(0, bounds.shape[1]), none, pending=pending)


@dataclass(eq=False)
class Run:
    """A run, between two steps or inside one.

    Attributes:
        objective: Points to values.
        bounds: The box (2, d).
        options: How to go on.
        record: Where it is.
        keeper: File of the record, or None.
    """

    objective: Objective
    bounds: Float[Tensor, "2 d"]
    options: Options
    record: Record
    keeper: RunCheckpoint | None
    _is_written: bool = True

    def __post_init__(self) -> None:
        place = None if self.keeper is None else posterior_file(self.keeper.path)
        self.chain = Chain(self.options, place)

    def until(
        self,
        steps: int,
        callback: Callable[[Step], bool | None] | None,
        progress: bool | None,
    ) -> Result:
        """Carry out what is missing of so many steps."""
        reason: Literal["finished", "stopped"] = "finished"
        hidden = None if progress is None else not progress
        with tqdm(
            desc="thompson_sampling", total=steps, unit="step", disable=hidden
        ) as bar:
            try:
                while self.record.pending is not None or self.record.done < steps:
                    if self.record.pending is None:
                        self._propose()
                    while self.record.pending is not None:
                        self._observe(self.record.pending)
                    last = self.record.history[-1]
                    bar.n = last.step
                    bar.set_postfix_str(f"best {last.best_y:.4g}")
                    if callback is not None and callback(last):
                        reason = "stopped"
                        break
            finally:
                self._write()  # of an error or Ctrl-C too, no result is lost
        record = self.record
        return Result(record.x, record.y, record.history, reason, self.chain.latest)

    def _keep(self, record: Record, *, at_once: bool = False) -> None:
        self.record = record
        self._is_written = False
        if at_once or self.keeper is None or self.keeper.is_due:
            self._write()

    def _write(self) -> None:
        if self.keeper is not None and not self._is_written:
            self.keeper.keep(self.record)
        self._is_written = True

    def _propose(self) -> None:
        """Condition on all data, maximise, write the proposals down."""
        self._write()  # the posterior's file must not be ahead of the record
        number = self.record.done + 1
        start = time.perf_counter()
        posterior = self.chain.at(self.record.x, self.record.y, self.record.history)
        solved = time.perf_counter()
        generator = derived_generator(self.options.seed, "candidates", number)
        x = self.options.maximiser(posterior, self.bounds, seed=generator).x.detach()
        solution = posterior.solution
        step = Step(
            number,
            len(self.record.y),
            float("nan"),
            passes=solution.passes,
            solver=solution.solver,
            reason=solution.reason,
            solve_seconds=solved - start,
            maximise_seconds=time.perf_counter() - solved,
        )
        pending = Pending(step, x, x.new_zeros(0))
        self._keep(replace(self.record, pending=pending), at_once=True)

    def _observe(self, pending: Pending) -> None:
        """Evaluate the next proposals and write the results down."""
        first = len(pending.results)
        count = self.options.evaluate_at_once or len(pending.proposals)
        start = time.perf_counter()
        values = evaluate(self.objective, pending.proposals[first : first + count])
        seconds = time.perf_counter() - start
        self._keep(self.record.with_values(values, seconds))


def evaluate(objective: Objective, x: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """The objective at x, checked.

    Raises:
        ValueError: Not one finite value for each point.
    """
    found = objective(x.clone())
    try:
        y = torch.as_tensor(found, device=x.device).detach().to(x)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"objective: expected {len(x)} values, one for each point, found "
            f"{found!r:.80}"
        ) from error
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (len(x),):
        raise ValueError(
            f"objective: expected {len(x)} values, one for each point, found shape "
            f"{tuple(y.shape)}"
        )
    bad = ~torch.isfinite(y)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"objective: expected finite values, found {float(y[first])} at "
            f"{x[first].tolist()}; nothing of this call has entered the data"
        )
    return y
