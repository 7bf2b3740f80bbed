"""Posteriors as functions of one input: mean, band, samples, data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from sgdgp.core.checks import check_count, check_finite, check_matrix
from sgdgp.networks import LinearisedPosterior
from sgdgp.plot.axes import Axes, axes_of, check_axes
from sgdgp.posterior.posterior import Posterior
from sgdgp.posterior.problem import observed_data

AnyPosterior: TypeAlias = Posterior | LinearisedPosterior
"""What has functions: of ``sgdgp.condition``, or of a regression network."""

BATCH = 1024
"""Points predicted at a time."""

_GRID = 200
"""Points along an input."""

_MOST_DATA = 2_000
"""Observations drawn, of more that many at equal distances in their order."""


_FEW = 200
"""Observations drawn larger."""


class Values(NamedTuple):
    """Of functions at n points, with an axis of outputs.

    Attributes:
        mean: (n, T).
        variance: (n, T).
    """

    mean: Tensor
    variance: Tensor


def posterior(
    p: AnyPosterior,
    x: Float[Tensor, "n 1"] | Float[Tensor, " n"],
    *,
    samples: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """Mean, a band of two standard deviations, sample functions and the data.

    The band is that of the function, without noise. Of several outputs each has a
    colour of its own.

    Args:
        p: A posterior over functions of one input.
        x: Where to draw it, (n', 1) or (n',), in any order.
        samples: How many of its sample functions to draw.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: Inputs have more than one dimension (see ``slice``), or do not fit.

    Example:
        >>> sgdgp.plot.posterior(posterior, torch.linspace(0, 1, 200))
    """
    check_axes(ax)
    check_posterior(p)
    check_count("samples", samples, 0)
    if isinstance(x, Tensor) and x.ndim == 1:
        x = x.unsqueeze(1)
    check_matrix("x", x)
    if x.shape[1] != 1:
        raise ValueError(
            f"x: expected inputs of one dimension, (n, 1) or (n,), found "
            f"{tuple(x.shape)}; sgdgp.plot.slice draws one input of several"
        )
    check_finite("x", x)
    x = x.detach()[x[:, 0].argsort()]
    values, drawn = values_at(p, x), _samples_at(p, x, samples)
    ax = axes_of(ax, 8.0, 4.0)
    t = x[:, 0].cpu()
    colours = _draw(ax, t, values, drawn)
    _draw_data(ax, _training_data(p), t, colours)
    ax.set(xlabel="x", ylabel="f(x)", xlim=(float(t[0]), float(t[-1])))
    _legend(ax, len(colours))
    return ax


def slice(
    p: AnyPosterior,
    x: Float[Tensor, " d"],
    dim: int,
    *,
    values: Float[Tensor, " n"] | None = None,
    samples: int = 5,
    ax: Axes | None = None,
) -> Axes:
    """The posterior along one input, all others fixed.

    Mean, a band of two standard deviations of the function, and sample functions; a
    dotted line is where x lies. Data are not drawn: they lie elsewhere in the other
    inputs.

    Args:
        p: A posterior over functions of d inputs.
        x: The point (d,) that the line goes through.
        dim: Which input varies, from 0.
        values: Its values (n',). Default: 200 over the range of the training data.
        samples: How many of its sample functions to draw.
        ax: Axes to draw into. Default: those of a new figure.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: An argument is of the wrong kind.
        ValueError: An argument does not fit, or a posterior that was read from a file
            does not know its training data: give ``values``.

    Example:
        >>> sgdgp.plot.slice(posterior, x.median(0).values, 2)
    """
    check_axes(ax)
    check_posterior(p)
    check_count("samples", samples, 0)
    check_matrix("x", x.unsqueeze(0) if isinstance(x, Tensor) and x.ndim == 1 else x)
    if x.ndim != 1:
        raise ValueError(f"x: expected one point (d,), found {tuple(x.shape)}")
    check_finite("x", x)
    check_count("dim", dim, 0)
    if dim >= len(x):
        raise ValueError(
            f"dim: expected an input of {len(x)}, 0 to {len(x) - 1}, found {dim}"
        )
    x = x.detach()
    if values is None:
        known = [inputs[:, dim] for inputs, _ in _training_data(p)]
        if not known:
            raise ValueError(
                "values: expected where to draw along dim; this posterior does not "
                "know its training data"
            )
        low, high = torch.aminmax(torch.cat(known))
        values = torch.linspace(float(low), float(high), _GRID)
    values = values.detach().to(x).sort().values
    points = x.repeat(len(values), 1)
    points[:, dim] = values
    found, drawn = values_at(p, points), _samples_at(p, points, samples)
    ax = axes_of(ax, 6.0, 4.0)
    colours = _draw(ax, values.cpu(), found, drawn)
    ax.axvline(float(x[dim]), color="0.4", lw=0.8, ls=":", zorder=1)
    others = [f"x[{i}] = {v:.3g}" for i, v in enumerate(x.tolist()) if i != dim]
    ax.set(
        xlabel=f"x[{dim}]",
        ylabel="f(x)",
        xlim=(float(values[0]), float(values[-1])),
        title=", ".join(others) if len(x) <= 5 else f"{len(x) - 1} other inputs fixed",
    )
    _legend(ax, len(colours))
    return ax


def check_posterior(p: Any) -> None:
    """Refuse all else.

    Raises:
        TypeError: Says what was found.
    """
    if not isinstance(p, Posterior | LinearisedPosterior):
        raise TypeError(
            "p: expected a posterior of sgdgp.condition or sgdgp.networks.linearise, "
            f"found {type(p).__name__}"
        )


@torch.no_grad()
def values_at(p: AnyPosterior, x: Any, **noise: Any) -> Values:
    """Means and variances at x on the CPU, of functions or with noise of targets."""
    found = p.predict(x, batch_size=BATCH, **noise)
    if isinstance(found, Tensor):
        raise ValueError(
            "p: expected a posterior of real values, found one of classes; "
            "sgdgp.plot.networks.reliability draws its probabilities"
        )
    return Values(*(_by_output(part.cpu()) for part in (found.mean, found.variance)))


def _by_output(values: Tensor) -> Tensor:
    """(n, T) of (n,) too."""
    return values.unsqueeze(-1) if values.ndim == 1 else values


@torch.no_grad()
def _samples_at(p: AnyPosterior, x: Tensor, count: int) -> Float[Tensor, "s n t"]:
    """The first samples, on the CPU."""
    if count == 0:
        return x.new_zeros(0, len(x), 1, device="cpu")
    found = p.samples(x)[:count].cpu()
    return found.unsqueeze(-1) if found.ndim == 2 else found


def _training_data(p: AnyPosterior) -> list[tuple[Tensor, Tensor]]:
    """Inputs (n, d) and targets (n,) of each output on the CPU; none are known: []."""
    if isinstance(p, Posterior):
        return [(x.cpu(), y.cpu()) for x, y in observed_data(p.solved)]
    batches = [] if p.stream is None else list(p.stream)
    if not batches or not isinstance(batches[0].x, Tensor) or batches[0].x.ndim != 2:
        return []
    x = torch.cat([batch.x for batch in batches]).cpu()
    y = torch.cat([batch.y for batch in batches]).cpu().reshape(len(x), -1)
    return [(x, column) for column in y.unbind(1)]


def _draw(ax: Axes, t: Tensor, values: Values, samples: Tensor) -> list[Any]:
    """Mean, band and samples along t (n,); the colour of each output."""
    colours = []
    for k, mean in enumerate(values.mean.unbind(1)):
        one = values.mean.shape[1] == 1
        label = "mean" if one else f"output {k}"
        (line,) = ax.plot(t, mean, lw=1.8, zorder=4, label=label)
        colour = line.get_color()
        half = 2 * values.variance[:, k].sqrt()
        band = ax.fill_between(
            t, mean - half, mean + half, color=colour, alpha=0.2, lw=0, zorder=2
        )
        drawn = samples[:, :, min(k, samples.shape[2] - 1)]
        lines = ax.plot(t, drawn.mT, color=colour, lw=0.7, alpha=0.6, zorder=3)
        if one:
            band.set_label("± 2 standard deviations")
            for first in lines[:1]:
                first.set_label(f"{len(lines)} sample functions")
        colours.append(colour)
    return colours


def _draw_data(
    ax: Axes,
    data: Sequence[tuple[Tensor, Tensor]],
    t: Tensor,
    colours: Sequence[Any],
) -> None:
    """Observations of every output within the range of t."""
    for (inputs, y), colour in zip(data, colours, strict=False):
        x = inputs[:, 0]
        inside = ((x >= t.min()) & (x <= t.max())).nonzero()[:, 0]
        most = min(_MOST_DATA, len(inside))
        shown = inside[torch.linspace(0, len(inside) - 1, most, device="cpu").long()]
        style: dict[str, Any] = {"color": colour}
        label = None
        if len(colours) == 1:
            some = f" ({most:,} of {len(inside):,})" if most < len(inside) else ""
            style, label = {"color": "0.5"}, f"data{some}"
        style |= {"ms": 6, "alpha": 0.8} if most < _FEW else {"ms": 3, "alpha": 0.5}
        ax.plot(x[shown], y[shown], ".", zorder=1, label=label, **style)


def _legend(ax: Axes, outputs: int) -> None:
    title = None if outputs == 1 else "means, ± 2 standard deviations"
    ax.legend(fontsize="small", title=title, title_fontsize="small")
