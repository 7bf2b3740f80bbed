"""A progress bar of a fit, with the parameters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tqdm.auto import tqdm

from sgdgp.training.history import FitCallback, FitEntry

_SHOWN = 4


@contextmanager
def fit_bar(
    show: bool | None, steps: int, callback: FitCallback | None
) -> Iterator[FitCallback | None]:
    """Wrap a callback so that it also moves a bar.

    Args:
        show: Whether to show it. Default: only on a terminal.
        steps: Length of the bar.
        callback: Callback to call on as well.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield callback
        return
    with tqdm(desc="fit", total=steps, unit="step") as bar:

        def moved(entry: FitEntry) -> bool | None:
            bar.update(entry.step + 1 - bar.n)
            bar.set_postfix_str(
                f"{describe(entry.parameters)}, residual {entry.residual:.0e}"
            )
            return None if callback is None else callback(entry)

        yield moved


def describe(parameters: Mapping[str, tuple[float, ...]]) -> str:
    """The first parameters in a few characters: a value, or smallest to largest."""
    parts = []
    for path, values in list(parameters.items())[:_SHOWN]:
        name = path.rpartition(".")[2]
        low, high = min(values), max(values)
        span = f"{low:.3g}" if len(values) == 1 else f"{low:.2g}..{high:.2g}"
        parts.append(f"{name} {span}")
    return ", ".join(parts)
