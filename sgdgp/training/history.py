"""What a fit did: one line per step, and how it ended."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import gpytorch
import torch

FitReason: TypeAlias = Literal["plateau", "steps", "budget", "interrupted", "diverged"]

_LARGEST = 64


@dataclass(frozen=True)
class FitEntry:
    """One step of a fit, before the parameters move.

    Attributes:
        step: Steps made before this one.
        passes: Passes over K so far.
        seconds: Wall time so far.
        value: log p(y | X) and log priors over n; above 1,000 rows counted from the
            first step (integrated along the path).
        residual: Largest relative residual of the step's solve.
        parameters: Values in the user's units, by GPyTorch's names without "raw_";
            of networks none.
    """

    step: int
    passes: float
    seconds: float
    value: float
    residual: float
    parameters: Mapping[str, tuple[float, ...]] = field(repr=False)


FitCallback: TypeAlias = Callable[[FitEntry], bool | None]
"""Called after every step with what was found before it; True stops the fit."""


@dataclass(frozen=True)
class Fitted:
    """How a fit went; the parameters themselves are in the model.

    Attributes:
        reason: "plateau", "steps", "budget", "interrupted" or "diverged".
        steps: Steps of the optimiser.
        passes: Passes over K of all solves.
        seconds: Wall time, of all runs together where a checkpoint was gone on from.
        history: One entry per step.
        warnings: Sentences that say what a user may want to do about it.
    """

    reason: FitReason
    steps: int
    passes: float
    seconds: float
    history: tuple[FitEntry, ...] = field(repr=False)
    warnings: tuple[str, ...] = ()


def parameter_values(model: torch.nn.Module) -> dict[str, tuple[float, ...]]:
    """Learned parameters of GPyTorch modules, through their constraints.

    Args:
        model: A GPyTorch model.
    """
    found: dict[str, tuple[float, ...]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, gpytorch.Module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and 0 < parameter.numel() <= _LARGEST:
                constraint = getattr(module, f"{name}_constraint", None)
                value = parameter.detach()
                if constraint is not None:
                    value = constraint.transform(value)
                told = ".".join(filter(None, (path, name.removeprefix("raw_"))))
                found[told] = tuple(value.flatten().tolist())
    return found
