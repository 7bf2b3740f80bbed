"""A posterior on disk with what its solve leaves to the next one.

What is left is in a file of its own, named by the number of rows: it is there before
the posterior is replaced, and an older one goes only afterwards. So each posterior that
is found has its own, or none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpytorch.models import ExactGP

from sgdgp.core.errors import CheckpointError, UnusableFileError
from sgdgp.posterior import PathwisePosterior, load
from sgdgp.posterior.carried_state import load_carried, save_carried, settled
from sgdgp.solvers.base import Solver


def posterior_file(place: Path) -> Path:
    """Where the posterior is kept that belongs to a record."""
    return place.with_name(place.name + ".posterior")


def store_posterior(posterior: PathwisePosterior, place: Path) -> PathwisePosterior:
    """Write a posterior; it comes back as it would be read.

    A preconditioner that cannot be stored is left out, and so are the directions: the
    next solve then is the same whether it starts from memory or from the file.
    """
    solution = posterior.solution
    own = _carried_file(place, len(posterior.problem.x))
    if solution.recycled is not None:
        try:
            save_carried(own, solution.recycled)
            solution = replace(solution, recycled=settled(solution.recycled))
        except TypeError:
            solution = replace(solution, recycled=None)
    posterior = replace(posterior, solution=solution)
    posterior.save(place)
    for path in _carried_files(place):
        if path != own:
            path.unlink(missing_ok=True)
    return posterior


def stored_posterior(
    place: Path, model: ExactGP, solver: Solver | str
) -> PathwisePosterior:
    """Read what ``store_posterior`` wrote.

    Raises:
        CheckpointError: A file is damaged, or not of a posterior of one output.
    """
    found = load(place, model, solver=solver)
    if not isinstance(found, PathwisePosterior):
        raise CheckpointError(f"checkpoint: {place} has several outputs, expected one")
    own = _carried_file(place, len(found.problem.x))
    if not own.exists():
        return found
    try:
        recycled = load_carried(own, found.problem.x.device)
    except UnusableFileError as error:
        raise CheckpointError(f"checkpoint: {error}; it may be deleted") from error
    return replace(found, solution=replace(found.solution, recycled=recycled))


def remove_posterior(place: Path) -> None:
    """Delete what was stored there, if anything."""
    for path in (place, *_carried_files(place)):
        path.unlink(missing_ok=True)


def _carried_file(place: Path, rows: int) -> Path:
    return place.with_name(f"{place.name}.carried.{rows}")


def _carried_files(place: Path) -> Iterator[Path]:
    start = f"{place.name}.carried."
    for path in list(place.parent.iterdir()):
        if path.name.startswith(start) and path.name.removeprefix(start).isdecimal():
            yield path
