"""What a run is asked to do: everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import math
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

_WHOLE = (
    "dim",
    "initial",
    "steps",
    "batch",
    "num_features",
    "objective_features",
    "num_candidates",
    "rounds",
    "starts",
    "ascent_steps",
    "points",
)
_POSITIVE = ("lengthscale", "seconds", "noise_std", "learning_rate")


@dataclass(frozen=True)
class Request:
    """One method on one objective.

    Attributes:
        method: One of ``METHODS``.
        seed: Of objective, initial points and everything else that is random.
        lengthscale: Of all coordinates.
        seconds: Budget of the solve, or of the variational fit, in every step.
        kept: Keep the sample functions from step to step, and solve from the last
            step's weights; else draw new ones and solve from zero.
        dim: Coordinates of the unit cube.
        initial: Uniform points that are known at the start.
        steps: Steps of one batch each.
        batch: Sample functions, and new points, of a step.
        noise_std: Standard deviation of the noise of observations.
        num_features: Random features of the posterior's prior functions.
        objective_features: Random features of the objective.
        num_candidates: Candidates of a round, shared by all functions.
        rounds: Rounds of candidates.
        starts: Candidates of a round from which each function is climbed.
        ascent_steps: Steps of the ascent.
        learning_rate: First step of the ascent, in lengthscales.
        points: Inducing points of the variational fit.
        dtype: "float32" or "float64".
    """

    method: str
    seed: int
    lengthscale: float
    seconds: float
    kept: bool = False
    dim: int = 8
    initial: int = 10_000
    steps: int = 10
    batch: int = 200
    noise_std: float = 1e-3
    num_features: int = 2048
    objective_features: int = 5000
    num_candidates: int = 500
    rounds: int = 12
    starts: int = 1
    ascent_steps: int = 25
    learning_rate: float = 0.2
    points: int = 1024
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in _WHOLE:
            value = getattr(self, name)
            if value < 1:
                raise ValueError(f"{name}: found {value}, expected at least 1")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"{name}: found {value}, expected a positive number")
        if self.dtype not in ("float32", "float64"):
            raise ValueError(
                f"dtype: found {self.dtype!r}, expected 'float32' or 'float64'"
            )

    @property
    def label(self) -> str:
        """What the table calls the method."""
        return f"{self.method}, kept" if self.kept else self.method

    @property
    def stem(self) -> str:
        """File name without suffix; equal exactly for equal requests."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        kept = "-kept" if self.kept else ""
        return f"{self.method}{kept}-{self.lengthscale:g}-{self.seed}-{digest}"

    @property
    def command(self) -> str:
        """The command line that repeats this run alone."""
        words = ["python", "-m", "benchmarks.thompson_sampling"]
        words += ["--methods", self.method, "--seeds", str(self.seed)]
        words += ["--lengthscales", f"{self.lengthscale:g}"]
        words += ["--seconds", f"{self.seconds:g}", *(["--kept"] if self.kept else [])]
        for name in SETTINGS:
            value = getattr(self, name)
            if value != _DEFAULTS[name]:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join(words)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


_DEFAULTS = {field.name: field.default for field in fields(Request)}
SETTINGS = tuple(
    name
    for name in _DEFAULTS
    if name not in ("method", "seed", "lengthscale", "seconds", "kept")
)
"""The fields that a table never mixes: one value for all of its runs."""
