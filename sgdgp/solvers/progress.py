"""A progress bar as a solver callback."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from sgdgp.solvers.base import Callback, Progress


@contextmanager
def progress_bar(
    show: bool | None, title: str, callback: Callback | None
) -> Iterator[Callback | None]:
    """Wrap a callback so that it also moves a bar.

    Args:
        show: Whether to show it. Default: only on a terminal.
        title: Name on the left of the bar.
        callback: Callback to call on as well.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield callback
        return
    with tqdm(
        desc=title,
        unit="pass",
        bar_format="{desc}: {n:.0f} passes [{elapsed}{postfix}]",
    ) as bar:

        def moved(progress: Progress) -> bool | None:
            bar.n = progress.passes
            kind = "residual" if progress.exact else "running residual"
            bar.set_postfix_str(f"{kind} {float(progress.residuals.max()):.1e}")
            return None if callback is None else callback(progress)

        yield moved
