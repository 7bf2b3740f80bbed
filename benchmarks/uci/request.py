"""What a run is asked to do: everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import shlex
from dataclasses import asdict, dataclass, fields
from typing import Any

DTYPES = ("float32", "float64")


@dataclass(frozen=True)
class RunRequest:
    """One run of one solver on one split.

    Attributes:
        dataset: Name of the data set.
        split: Which of the ten splits.
        solver: A name in ``benchmarks.uci.solvers``, or ``"exact"``.
        hyperparameters: ``"published"``, ``"default"`` or the path of a JSON file.
        num_samples: Posterior samples, from which the variance is estimated.
        dtype: ``"float32"`` or ``"float64"``.
        seed: Of the prior draws and the solver.
        memory_budget: Bytes for kernel blocks. Default: the library's own.
        max_passes: Budget in passes over K. Default: the solver's own.
        noise_scale: Replaces the noise standard deviation.
    """

    dataset: str
    split: int
    solver: str
    hyperparameters: str = "published"
    num_samples: int = 64
    dtype: str = "float32"
    seed: int = 0
    memory_budget: int | None = None
    max_passes: float | None = None
    noise_scale: float | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {DTYPES}")
        if self.num_samples < 1:
            raise ValueError(
                f"num_samples: found {self.num_samples}, expected at least 1"
            )
        for name in ("memory_budget", "max_passes", "noise_scale"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}: found {value}, expected a positive number")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @property
    def stem(self) -> str:
        """File name without suffix; equal exactly for equal requests."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{self.dataset}-{self.split}-{self.solver}-{digest}"

    @property
    def variant(self) -> str:
        """Every setting that is not the default, in words ("" if none)."""
        words = [
            f"{field.name.replace('_', ' ')} {getattr(self, field.name)}"
            for field in fields(self)[3:]
            if getattr(self, field.name) != field.default
        ]
        return ", ".join(words)

    @property
    def command(self) -> str:
        """The command line that repeats this run alone."""
        words = ["python", "-m", "benchmarks.uci", "--datasets", self.dataset]
        words += ["--splits", str(self.split)]
        if self.solver == "exact":
            words += ["--solvers", "--reference", "exact"]
        else:
            words += ["--solvers", self.solver]
        for field in fields(self)[3:]:
            value = getattr(self, field.name)
            if value is not None:
                words += ["--" + field.name.replace("_", "-"), str(value)]
        return shlex.join(words)


def exact_request(request: RunRequest) -> RunRequest:
    """The exact reference that ``request`` is compared with: float64, no samples."""
    return RunRequest(
        request.dataset,
        request.split,
        "exact",
        hyperparameters=request.hyperparameters,
        dtype="float64",
        noise_scale=request.noise_scale,
    )
