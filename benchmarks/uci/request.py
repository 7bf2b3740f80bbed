"""What a run is asked to do: everything that its figures depend on."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

DTYPES = ("float32", "float64")
FIT = "fit"
"""The ``hyperparameters`` of a run that learns its own from the data."""

PEERS: Mapping[str, str] = {
    "exact": "gpytorch-exact",
    "cg": "gpytorch-cg",
    "svgp": "gpytorch-svgp",
    "sklearn": "sklearn",
    "iterative-gp": "iterative-gp",
}
"""Names after ``--peers`` -> what stands in the place of the solver."""

USUAL: Mapping[str, Any] = {
    "fit_steps": 100,
    "fit_passes_per_step": 10.0,
    "fit_learning_rate": 0.1,
    "cg_rank": 100,
    "svgp_points": 1024,
    "svgp_epochs": 100,
    "svgp_batch": 1024,
    "svgp_learning_rate": 0.01,
    "sklearn_rows": 2000,
}
"""What the command line sets where it is not told otherwise."""

_FIRST = ("dataset", "split", "solver")
_BESIDES = ("reference",)
"""Computed off the clock: two runs that differ in it are runs of the same thing."""
_LATER = ("initialise", *USUAL, "max_seconds", "reference", "device")


@dataclass(frozen=True)
class RunRequest:
    """One run of one solver on one split.

    Attributes:
        dataset: Name of the data set.
        split: Which of the ten splits.
        solver: A name in ``benchmarks.uci.solvers``, ``"exact"``, or one of the
            values of ``PEERS``.
        hyperparameters: ``"published"``, ``"default"``, ``"fit"`` or the path of a
            JSON file.
        num_samples: Posterior samples, from which the variance is estimated.
        dtype: ``"float32"`` or ``"float64"``.
        seed: Of the prior draws and the solver.
        memory_budget: Bytes for kernel blocks. Default: the library's own.
        max_passes: Budget in passes over K. Default: the solver's own.
        noise_scale: Replaces the noise standard deviation.
        fit_steps: Optimiser steps of a fit. This field and the ones below are None
            where they do not concern the run, and then no part of its file name.
        fit_passes_per_step: Budget of a step, in passes over K.
        fit_learning_rate: Of Adam.
        initialise: ``"subsets"`` starts the fit from exact fits of small subsets.
        max_seconds: Limit of the training's wall time.
        reference: ``"exact"`` adds float64 figures at the learnt hyperparameters.
        cg_rank: Size of the preconditioner of GPyTorch's conjugate gradients.
        svgp_points: Inducing points.
        svgp_epochs: Passes over the training data.
        svgp_batch: Rows of a minibatch.
        svgp_learning_rate: Of Adam.
        sklearn_rows: Size of the random subset that scikit-learn is given.
        device: Where everything is computed, as PyTorch names it. Default: the CPU.
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
    fit_steps: int | None = None
    fit_passes_per_step: float | None = None
    fit_learning_rate: float | None = None
    initialise: str | None = None
    max_seconds: float | None = None
    reference: str | None = None
    cg_rank: int | None = None
    svgp_points: int | None = None
    svgp_epochs: int | None = None
    svgp_batch: int | None = None
    svgp_learning_rate: float | None = None
    sklearn_rows: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: found {self.dtype!r}, expected one of {DTYPES}")
        if self.num_samples < 1:
            raise ValueError(
                f"num_samples: found {self.num_samples}, expected at least 1"
            )
        for name in ("memory_budget", "max_passes", "noise_scale", "max_seconds"):
            self._check_positive(name)
        for name in USUAL:
            self._check_positive(name)
        if self.hyperparameters == FIT and self.noise_scale is not None:
            raise ValueError(
                f"noise_scale: found {self.noise_scale} with hyperparameters 'fit', "
                "which learns the noise; leave it out"
            )
        if self.is_peer and self.hyperparameters != FIT:
            raise ValueError(
                f"peers: found hyperparameters {self.hyperparameters!r}; peers learn "
                "their own, so they need --hyperparameters fit"
            )

    def _check_positive(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and not value > 0:
            raise ValueError(f"{name}: found {value}, expected a positive number")

    @property
    def is_peer(self) -> bool:
        """Whether another package does the work."""
        return self.solver in PEERS.values()

    def setting(self, name: str) -> Any:
        """One of the fields in ``USUAL``; the usual value where it is not set."""
        value = getattr(self, name)
        return USUAL[name] if value is None else value

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.

        Fields that results got later are left out where they are not set, so that
        results which were stored before are still found.
        """
        values = asdict(self)
        return {k: v for k, v in values.items() if k not in _LATER or v is not None}

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
            for field in fields(self)
            if field.name not in (*_FIRST, *_BESIDES)
            and getattr(self, field.name) not in (field.default, USUAL.get(field.name))
        ]
        return ", ".join(words)

    @property
    def command(self) -> str:
        """The command line that repeats this run alone."""
        words = ["python", "-m", "benchmarks.uci", "--datasets", self.dataset]
        words += ["--splits", str(self.split)]
        if self.solver == "exact":
            words += ["--solvers", "--reference", "exact"]
        elif self.is_peer:
            (peer,) = (name for name, solver in PEERS.items() if solver == self.solver)
            words += ["--solvers", "--peers", peer]
        else:
            words += ["--solvers", self.solver]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in _FIRST and value is not None:
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
        device=request.device,
    )
