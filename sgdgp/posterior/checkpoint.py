"""Solves that survive the end of their process.

While a solve runs, its weights go to a file now and then; when it ends, the solution
does. Called again, it goes on from there. Prior draws are not in the file: they are
drawn again from the seed, and the file is refused where they do not come out the same.

What makes two problems the same one has two halves. The *components* are hashes of
everything that is given: data, parameters, structure of the model, seed and sizes; they
are known before any work and must agree bit by bit. The *probe* holds a few numbers of
the system that follows from them. It is compared within a tolerance, so that another
device or thread count is no other problem, while code that changed (a kernel's forward,
a library's random stream) is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core import format_1
from sgdgp.core.checkpoint import Checkpoint
from sgdgp.core.files import FileKind
from sgdgp.core.hashes import digest, former_structure_of, structure_of
from sgdgp.operators.base import KernelOperator
from sgdgp.posterior.problem import Observations, Problem, Settings
from sgdgp.solvers.base import HistoryEntry, Progress, Solution, Solver

KIND = FileKind("sgdgp.checkpoint", 2, "checkpoint", format_1.solve)

_POINTS = 16  # of the kernel in a probe: enough to tell kernels apart, free to evaluate
_PROBED = {
    "kernel": (1e-3, "values of the kernel"),
    "noise": (1e-5, "noise variances"),
    "rhs": (
        1e-3,
        "targets and prior draws made from the same seed (they also change with the "
        "versions of sgdgp and torch)",
    ),
}
"""Relative tolerances and words. Kernel values and draws differ between devices by the
rounding of float32 over long sums; noise variances are copied, not computed."""


class SolveCheckpoint(Checkpoint):
    """The file of one problem: ``open_for`` it, then ``solve``."""

    kind = KIND
    work = "problem"

    def __init__(self, path: str | os.PathLike[str], every: int | float) -> None:
        super().__init__(path, every)
        self._first = self.path
        self._stored: tuple[Solution, str, dict[str, Tensor]] | None = None

    def open_for(
        self,
        index: int,
        model: torch.nn.Module,
        data: Observations,
        generator: torch.Generator,
        num_samples: int,
        settings: Settings,
    ) -> None:
        """Read the file of a system, if there is one.

        Args:
            index: Number of the system; from the second on it has a file of its own.
            model: The model whose prior and noise are conditioned.
            data: What was observed.
            generator: Source of the prior draws, before the first of them.
            num_samples: Posterior sample functions.
            settings: How they are drawn.

        Raises:
            CheckpointError: The file is damaged, foreign, of a newer format or of
                another problem.
        """
        if index > 0:
            self.path = self._first.with_name(f"{self._first.name}.{index}")
        components = {
            "the training inputs x": digest(data.x),
            "the training targets y": digest(data.y.flatten()),
            "dtype": str(data.x.dtype),
            "num_samples": str(num_samples),
            "num_features": str(settings.num_features),
            "the seed, or the state of the generator that was passed": digest(
                generator.get_state()
            ),
            **{f"parameter {k}": digest(v) for k, v in model.state_dict().items()},
            **structure_of(model),
        }
        found = self.open(components, former_structure_of(model), data.x.device)
        self._stored = None
        if found is not None:
            with self.reading():
                self._stored = found["solution"], found["solver"], found["probe"]

    def solve(self, problem: Problem, generator: torch.Generator) -> Solution:
        """Return the stored solution, or go on from it, or start; and write.

        Args:
            problem: The problem; its solver's budgets are for all runs together.
            generator: Source of everything random in the solver.

        Raises:
            CheckpointError: The file's weights do not belong to the problem.
        """
        solver, rhs, before = problem.solver, problem.rhs, None
        probe = _probe(problem.operator, problem.noise, rhs)
        if self._stored is not None:
            before, settings, stored = self._stored
            self.refuse(_differing(stored, probe))
            with self.reading():
                _check_weights(before, rhs)
            if _is_final(before, settings, solver):
                return before
        writer = _Writer(self, solver, probe, before or _nothing_yet(solver, rhs))
        try:
            solution = problem.solve(generator, after=before, listener=writer)
        except BaseException:  # Ctrl-C, or an error in a callback
            writer.keep()
            raise
        writer.finish(solution)
        if self.problem is None:
            return solution
        return replace(solution, warnings=(*solution.warnings, self.problem))


class _Writer:
    """Callback that writes the best weights so far, and the history of all runs."""

    def __init__(
        self,
        file: SolveCheckpoint,
        solver: Solver,
        probe: Mapping[str, Tensor],
        before: Solution,
    ) -> None:
        self._file = file
        self._solver = solver
        self._probe = probe
        self._before = before
        self._history = list(before.history)
        self._residuals = before.residuals.cpu()
        self._weights: Tensor | None = None
        self._latest: Progress | None = None
        self._has_file = before.passes > 0
        file.wait()

    def __call__(self, progress: Progress) -> None:
        """Write when it is time; told of the passes and seconds of all runs."""
        self._history.append(
            HistoryEntry(
                progress.passes,
                progress.seconds,
                tuple(progress.residuals.tolist()),
                progress.exact,
            )
        )
        self._latest = progress
        if self._file.is_due:
            self.keep()
            self._file.wait()

    def keep(self) -> None:
        """Write the weights that were last told of, if they are better."""
        if self._latest is None:
            return
        now = replace(
            self._before,
            solver=self._solver.name,
            residuals=self._latest.residuals.detach(),
            passes=self._latest.passes,
            seconds=self._latest.seconds,
            reason="interrupted",
            history=tuple(self._history),
            warnings=(),
            settings={},
        )
        self._write_better(now, self._latest.weights)

    def finish(self, solution: Solution) -> None:
        """Write what the solve ended with."""
        if solution.reason == "interrupted":
            # A solver may have been stopped before it had anything to show.
            self._write_better(solution, lambda: solution.weights, is_last=True)
        else:
            self._write(solution)

    def _write_better(
        self, now: Solution, weights: Callable[[], Tensor], is_last: bool = False
    ) -> None:
        """Write with the best weights of each column so far, if any is new.

        The last time only the passes may be new: they count against the budget.

        A direct solver has nothing to show until it is done, and a stochastic one may
        be worse than it was: nothing in the file ever gives way to something worse.
        """
        residuals = now.residuals.to(self._residuals)
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
        self._file.write(
            solution=replace(solution, recycled=None),
            solver=repr(self._solver),
            probe=dict(self._probe),
        )
        self._has_file |= self._file.problem is None


def _nothing_yet(solver: Solver, rhs: Tensor) -> Solution:
    return Solution(
        solver=solver.name,
        operator="",
        weights=torch.zeros_like(rhs, device="cpu"),
        residuals=torch.ones(rhs.shape[1], dtype=rhs.dtype, device="cpu"),
        passes=0.0,
        seconds=0.0,
        reason="interrupted",
    )


def _check_weights(before: Solution, rhs: Tensor) -> None:
    if before.weights.shape != rhs.shape or before.weights.dtype != rhs.dtype:
        raise ValueError(
            f"{before.weights.dtype} weights of shape {tuple(before.weights.shape)}, "
            f"expected {rhs.dtype} and {tuple(rhs.shape)}"
        )


def _is_final(stored: Solution, settings: str, solver: Solver) -> bool:
    """Whether calling the solver again could not give more than is stored."""
    if stored.reason == "interrupted":
        return False
    if settings == repr(solver):
        return True
    tolerance = solver.limits.tolerance
    return (
        stored.reason == "converged"
        and tolerance is not None
        and float(stored.residuals.max()) <= tolerance
    )


def _probe(
    operator: KernelOperator, noise: Float[Tensor, " n"], rhs: Float[Tensor, "n k"]
) -> dict[str, Tensor]:
    """A few kernel values, the noise and two numbers of each right-hand side."""
    n = rhs.shape[0]
    points = torch.linspace(0, n - 1, min(n, _POINTS), device=rhs.device).long()
    wave = torch.arange(n, dtype=torch.float64, device=rhs.device).cos()
    # Column by column: all of them in float64 would double the memory.
    sketch = [
        torch.stack([column.norm(), wave @ column])
        for column in (rhs[:, i].double() for i in range(rhs.shape[1]))
    ]
    return {
        "kernel": operator.streaming().block(points, points).detach().double(),
        "noise": noise.detach(),
        "rhs": torch.stack(sketch, dim=1),
    }


def _differing(stored: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> list[str]:
    """Names of the probed quantities that are not the same, in words."""
    return [
        words
        for name, (tolerance, words) in _PROBED.items()
        if not _is_close(stored.get(name), here[name], tolerance)
    ]


def _is_close(stored: Tensor | None, here: Tensor, tolerance: float) -> bool:
    if stored is None or stored.shape != here.shape:
        return False
    # Relative to the largest of a column: an off-diagonal entry, or the product of the
    # wave with a column, may be near zero by accident. Noise is compared one by one.
    size = here.abs().amax(dim=0) if here.ndim == 2 else here.abs()
    return bool(((stored - here).abs() <= tolerance * size).all())
