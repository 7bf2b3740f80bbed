"""What a race is asked to do: everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.solvers.problems import ProblemSpec


@dataclass(frozen=True)
class RaceRequest:
    """One contender on one problem, to one tolerance.

    Attributes:
        problem: What is solved.
        solver: Name of the contender.
        tolerance: Mean relative residual to reach.
        max_passes: Budget in passes over K.
        max_seconds: Budget in seconds.
        memory_budget: Bytes for kernel entries. Default: half of what is free.
        threads: Threads of torch. Default: torch's own choice.
        trace: Look at the residual on the way, off the clock (for the figure).
    """

    problem: ProblemSpec
    solver: str
    tolerance: float
    max_passes: float
    max_seconds: float
    memory_budget: int | None = None
    threads: int | None = None
    trace: bool = False

    def __post_init__(self) -> None:
        for name in (
            "tolerance",
            "max_passes",
            "max_seconds",
            "memory_budget",
            "threads",
        ):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}: found {value}, expected a positive number")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RaceRequest:
        """The request that ``to_dict`` told of."""
        return cls(**{**values, "problem": ProblemSpec(**values["problem"])})

    @property
    def stem(self) -> str:
        """File name without suffix; equal exactly for equal requests."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        words = [self.problem.family, self.problem.variant, self.solver]
        words += ["trace" if self.trace else f"{self.tolerance:g}", digest]
        return re.sub(r"[^\w.+-]", "_", "-".join(words))

    @property
    def command(self) -> str:
        """The command line that repeats this run alone."""
        problem = self.problem
        words = ["python", "-m", "benchmarks.solvers", "--problem", problem.name]
        words += ["--solvers", self.solver, "--tolerances", f"{self.tolerance:g}"]
        options = {
            "columns": problem.columns,
            "n": problem.n,
            "dtype": problem.dtype,
            "seed": problem.seed,
            "noise-scale": problem.noise_scale,
            "max-passes": f"{self.max_passes:g}",
            "max-seconds": f"{self.max_seconds:g}",
            "memory-budget": self.memory_budget,
            "threads": self.threads,
        }
        for name, value in options.items():
            if value is not None:
                words += [f"--{name}", str(value)]
        return shlex.join([*words, "--plot"] if self.trace else words)
