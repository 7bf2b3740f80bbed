"""New data for the outputs of a model: warm solves, and the data as they are then."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sgdgp.botorch.definition import Observations, single_models
from sgdgp.botorch.outputs import Outputs
from sgdgp.core.checks import check_matrix, check_same
from sgdgp.gpytorch_adapter import has_fixed_noise
from sgdgp.posterior import MultiOutputPosterior


def all_columns(
    name: str, values: Tensor, columns: Sequence[int] | None, count: int
) -> Tensor:
    """Values (..., m) of some outputs as those of all, NaN where there is none.

    Raises:
        ValueError: Not one column for each output.
    """
    width = count if columns is None else len(columns)
    if values.ndim < 2 or values.shape[-1] != width:
        raise ValueError(
            f"{name}: expected shape (n, {width}), found {tuple(values.shape)}"
        )
    if columns is None:
        return values
    full = values.new_full((*values.shape[:-1], count), float("nan"))
    full[..., list(columns)] = values
    return full


def updated(
    outputs: Sequence[Outputs],
    data: Sequence[Observations],
    definition: nn.Module,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    progress: bool | None,
) -> list[tuple[Outputs, Observations]]:
    """Every output given its share of new data, with the same functions.

    Args:
        outputs: All outputs of a model.
        data: Their data so far.
        definition: The model's definition.
        x: New inputs (n', d).
        y: New targets (n', m), in the user's units.
        noise: New noise variances (n', m) in the units after outcome transforms.
        progress: Show progress bars.

    Raises:
        TypeError: Data are of the wrong kind.
        ValueError: They do not fit, noise is needed, or would be estimated.
    """
    check_matrix("X", x, data[0].x.shape[1])
    check_same("X", x, "the training inputs", data[0].x)
    check_same("Y", y, "X", x)
    if len(x) != len(y):
        raise ValueError(
            f"Y: expected {len(x)} rows, one for each row of X, found {len(y)}"
        )
    if noise is not None and noise.shape != y.shape:
        raise ValueError(
            f"noise: expected shape {tuple(y.shape)}, found {tuple(noise.shape)}"
        )
    models = single_models(definition)
    found, first = [], 0
    for index, (part, seen) in enumerate(zip(outputs, data, strict=True)):
        own = slice(first, first + seen.num_outputs)
        first += seen.num_outputs
        rows = ~torch.isnan(y[:, own]).all(dim=1)
        if not bool(rows.any()):
            found.append((part, seen))
            continue
        likelihood = models[min(index, len(models) - 1)].likelihood
        known = seen.variances
        if known is None and has_fixed_noise(likelihood):
            # From now on the definition does not know all of them.
            own_noise = likelihood.noise_covar.noise.reshape(len(seen.y), -1)
            known = part.scale**2 * own_noise
        elif known is None and noise is not None:
            raise ValueError(
                "noise: expected none, since the likelihood estimates the noise; known "
                "variances are for models with train_Yvar"
            )
        given = None if noise is None else noise[rows][:, own]
        targets = y[rows][:, own]
        found.append(_part(part, seen, known, x[rows], targets, given, progress))
    return found


def _part(
    part: Outputs,
    seen: Observations,
    known: Tensor | None,
    x: Tensor,
    y: Tensor,
    noise: Tensor | None,
    progress: bool | None,
) -> tuple[Outputs, Observations]:
    settings: dict[str, Any] = {"progress": progress}
    targets = part.units.latent(y, x)
    if noise is not None:
        settings["noise"] = noise * (part.scale / part.units.factor) ** 2
    if not isinstance(part.posterior, MultiOutputPosterior):
        targets = targets[:, 0]
        if noise is not None:
            settings["noise"] = settings["noise"][:, 0]
    posterior = part.posterior.update(x, targets, **settings)
    if known is not None and noise is not None:
        known = torch.cat([known.expand_as(seen.y), noise * part.scale**2])
    data = Observations(torch.cat([seen.x, x]), torch.cat([seen.y, y]), known)
    return part.of(posterior), data
