"""A Thompson sampling run: condition, maximise, observe, and a record of all of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

import sgdgp.bayesopt.record as records
from sgdgp.bayesopt.chain import Chain, Options
from sgdgp.bayesopt.record import Pending, Record, Step
from sgdgp.core.seeds import derived_generator
from sgdgp.posterior import PathwisePosterior

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


class Run:
    """A run, between two steps or inside one.

    Args:
        objective: Points to values.
        bounds: The box (2, d).
        options: How to go on.
        record: Where it is.
        place: File of the record, or None.
    """

    def __init__(
        self,
        objective: Objective,
        bounds: Float[Tensor, "2 d"],
        options: Options,
        record: Record,
        place: Path | None,
    ) -> None:
        self.objective = objective
        self.bounds = bounds
        self.options = options
        self.record = record
        self.place = place
        self.chain = Chain(options, None if place is None else posterior_file(place))

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
        found = self.record
        return Result(found.x, found.y, found.history, reason, self.chain.latest)

    def _keep(self, record: Record) -> None:
        if self.place is not None:
            records.write(self.place, record)
        self.record = record

    def _propose(self) -> None:
        """Condition on all data, maximise, write the proposals down."""
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
        self._keep(replace(self.record, pending=pending))

    def _observe(self, pending: Pending) -> None:
        """Evaluate the next proposals and write the results down."""
        first = len(pending.results)
        count = self.options.evaluate_at_once or len(pending.proposals)
        start = time.perf_counter()
        values = observed(self.objective, pending.proposals[first : first + count])
        self._keep(self.record.observed(values, time.perf_counter() - start))


def posterior_file(place: Path) -> Path:
    """Where the posterior is kept that belongs to a record."""
    return place.with_name(place.name + ".posterior")


def observed(objective: Objective, x: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """The objective at x, checked.

    Raises:
        ValueError: Not one finite value for each point.
    """
    y = torch.as_tensor(objective(x.clone())).detach().to(x)
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
