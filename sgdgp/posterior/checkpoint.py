"""Solves that survive the end of their process.

While a solve runs, its weights go to a file now and then; when it ends, the solution
does. Called again, it goes on from there. Prior draws are not in the file: they are
drawn again from the seed, and the file is refused where they do not come out the same.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from sgdgp.core.errors import CheckpointError
from sgdgp.posterior.checkpoint_file import Saved, checked_place, read, write
from sgdgp.posterior.fingerprint import differing_components, differing_probes
from sgdgp.solvers.base import Callback, HistoryEntry, Progress, Solution, Solver
from sgdgp.solvers.solutions import continued

Attempt: TypeAlias = Callable[[Solver, Tensor | None, Callback | None], Solution]
"""A solve as a function of (solver, starting point, callback)."""


class Checkpoint:
    """The file of one problem: ``open`` it, then ``solve``.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes, at least.

    Raises:
        CheckpointError: Nothing can be written at ``path``.
        TypeError: ``path`` is no path or ``every`` no number.
        ValueError: ``every`` is not positive and finite.
    """

    def __init__(self, path: str | os.PathLike[str], every: int | float) -> None:
        self.path = checked_place(path, every)
        self._every = every
        self._components: Mapping[str, str] = {}
        self._saved: Saved | None = None

    def open(self, components: Mapping[str, str]) -> None:
        """Read the file, if there is one.

        Args:
            components: Hashes of the problem at hand (``fingerprint.components``).

        Raises:
            CheckpointError: The file is damaged, foreign, of a newer format or of
                another problem.
        """
        self._components = components
        self._saved = read(self.path) if self.path.exists() else None
        if self._saved is not None:
            self._refuse(differing_components(self._saved.components, components))

    def solve(
        self,
        solver: Solver,
        attempt: Attempt,
        rhs: Tensor,
        probe: Mapping[str, Tensor],
        callback: Callback | None,
    ) -> Solution:
        """Return the stored solution, or go on from it, or start; and write.

        Args:
            solver: Settings; their budgets are for all runs together.
            attempt: Solves with given settings, starting point and callback.
            rhs: The right-hand sides (n, k).
            probe: Numbers of the problem at hand (``fingerprint.probe``).
            callback: Called with the passes and seconds of all runs.

        Raises:
            CheckpointError: The file's weights do not belong to ``rhs``.
        """
        before, initial = None, None
        if self._saved is not None:
            self._refuse(differing_probes(self._saved.probe, probe))
            before = self._saved.solution
            if before.weights.shape != rhs.shape or before.weights.dtype != rhs.dtype:
                raise CheckpointError(
                    f"checkpoint: {self.path} holds {before.weights.dtype} weights of "
                    f"shape {tuple(before.weights.shape)}, expected {rhs.dtype} and "
                    f"{tuple(rhs.shape)}; delete it or give another path to start anew."
                )
            before = replace(
                before,
                weights=before.weights.to(rhs.device),
                residuals=before.residuals.to(rhs.device),
            )
            if _is_final(self._saved, solver):
                return before
            initial = before.weights
        writer = _Writer(self, solver, probe, before or _nothing_yet(solver, rhs))
        solution = attempt(
            solver
            if before is None
            else solver.with_limits(solver.limits.less(before.passes, before.seconds)),
            initial,
            writer.following(callback),
        )
        if before is not None:
            solution = continued(before, solution)
        writer.finish(solution)
        if writer.problem is None:
            return solution
        return replace(solution, warnings=(*solution.warnings, writer.problem))

    def _refuse(self, differing: list[str]) -> None:
        if not differing:
            return
        more = f" and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise CheckpointError(
            f"checkpoint: {self.path} belongs to another problem. Different here: "
            f"{'; '.join(differing[:5])}{more}. It is left as it is: restore what was "
            "used when it was written, or delete it or give another path to start "
            "anew."
        )

    def put(self, solver: Solver, probe: Mapping[str, Tensor], now: Solution) -> None:
        """Write a solution into the file."""
        write(self.path, Saved(now, repr(solver), self._components, probe))


class _Writer:
    """Callback that writes the best weights so far, and keeps the accounts."""

    def __init__(
        self,
        file: Checkpoint,
        solver: Solver,
        probe: Mapping[str, Tensor],
        before: Solution,
    ) -> None:
        self.problem: str | None = None
        self._file = file
        self._solver = solver
        self._probe = probe
        self._before = before
        self._history = list(before.history)
        self._residuals = before.residuals.cpu()
        self._weights: Tensor | None = None
        self._has_file = before.passes > 0
        self._next = time.monotonic() + file._every

    def following(self, callback: Callback | None) -> Callback:
        """A callback that writes when it is time, then calls the given one."""

        def called(progress: Progress) -> bool | None:
            progress = replace(
                progress,
                passes=self._before.passes + progress.passes,
                seconds=self._before.seconds + progress.seconds,
            )
            self._history.append(
                HistoryEntry(
                    progress.passes,
                    progress.seconds,
                    tuple(progress.residuals.tolist()),
                    progress.exact,
                )
            )
            if time.monotonic() >= self._next:
                self._keep(progress)
                self._next = time.monotonic() + self._file._every
            return None if callback is None else callback(progress)

        return called

    def finish(self, solution: Solution) -> None:
        """Write what the solve ended with."""
        if solution.reason == "interrupted":
            # A solver may have been stopped before it had anything to show.
            self._write_better(
                solution,
                solution.residuals.cpu(),
                lambda: solution.weights,
                is_last=True,
            )
        else:
            self._write(solution)

    def _keep(self, progress: Progress) -> None:
        now = replace(
            self._before,
            solver=self._solver.name,
            passes=progress.passes,
            seconds=progress.seconds,
            reason="interrupted",
            history=tuple(self._history),
            warnings=(),
            settings={},
        )
        self._write_better(now, progress.residuals.detach().cpu(), progress.weights)

    def _write_better(
        self,
        now: Solution,
        residuals: Tensor,
        weights: Callable[[], Tensor],
        is_last: bool = False,
    ) -> None:
        """Write with the best weights of each column so far, if any is new.

        The last time only the passes may be new: they count against the budget.

        A direct solver has nothing to show until it is done, and a stochastic one may
        be worse than it was: nothing in the file ever gives way to something worse.
        """
        residuals = residuals.to(self._residuals.dtype)
        better = residuals < self._residuals
        if not bool(better.any()) and not (is_last and self._has_file):
            return
        current = weights().detach().cpu()
        better &= torch.isfinite(current).all(dim=0)
        if self._weights is None:
            self._weights = self._before.weights.cpu()
        self._weights = torch.where(better, current, self._weights)
        self._residuals = torch.where(better, residuals, self._residuals)
        self._write(replace(now, weights=self._weights, residuals=self._residuals))

    def _write(self, solution: Solution) -> None:
        self.problem = None
        try:
            self._file.put(self._solver, self._probe, solution)
            self._has_file = True
        except OSError as error:
            # A full disk must not end a solve of hours.
            self.problem = (
                f"The checkpoint {self._file.path} could not be written ({error}); "
                "it holds an earlier state, or nothing."
            )


def _nothing_yet(solver: Solver, rhs: Tensor) -> Solution:
    return Solution(
        solver=solver.name,
        operator="",
        weights=torch.zeros_like(rhs, device="cpu"),
        residuals=torch.ones(rhs.shape[1], dtype=rhs.dtype),
        passes=0.0,
        seconds=0.0,
        reason="interrupted",
    )


def _is_final(saved: Saved, solver: Solver) -> bool:
    """Whether calling the solver again could not give more than is stored."""
    if saved.solution.reason == "interrupted":
        return False
    if saved.solver == repr(solver):
        return True
    tolerance = solver.limits.tolerance
    return (
        saved.solution.reason == "converged"
        and tolerance is not None
        and float(saved.solution.residuals.max()) <= tolerance
    )
