"""Names on the command line -> solvers of the library."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sgdgp
from sgdgp.solvers.base import Solver


def _auto(max_passes: float | None) -> str:
    # "auto" takes no settings; its budget is kept by the callback of the run.
    return "auto"


def _sdd(max_passes: float | None) -> Solver:
    return sgdgp.SDD() if max_passes is None else sgdgp.SDD(max_passes=max_passes)


def _cg(max_passes: float | None) -> Solver:
    return sgdgp.CG() if max_passes is None else sgdgp.CG(max_passes=max_passes)


def _cholesky(max_passes: float | None) -> Solver:
    return sgdgp.Cholesky()


SOLVERS: Mapping[str, Callable[[float | None], Solver | str]] = {
    "auto": _auto,
    "sdd": _sdd,
    "cg": _cg,
    "cholesky": _cholesky,
}
