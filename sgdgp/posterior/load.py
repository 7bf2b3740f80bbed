"""Posteriors out of files; ``storage`` has what is in them."""

from __future__ import annotations

import os

from gpytorch.models import ExactGP

from sgdgp.core.codec import Contents, fitting, read_values
from sgdgp.core.files import path_of, reads
from sgdgp.posterior.posterior import Posterior, posterior_of
from sgdgp.posterior.storage import KIND, parts_from
from sgdgp.solvers.base import Solver


@reads(KIND)
def load(
    path: str | os.PathLike[str],
    model: ExactGP,
    *,
    solver: Solver | str | None = None,
) -> Posterior:
    """Read a posterior that was saved; it predicts the same numbers.

    Args:
        path: The file.
        model: A model built like the one that was saved: it gives the structure, the
            file the parameters. It is copied and never changed. What a model keeps
            outside its ``state_dict`` comes from it as well.
        solver: Solver of later draws and updates. Default: the one that was saved; a
            solver that is not of this package is not in the file, and "auto" takes
            its place with a warning.

    Returns:
        The posterior, on the model's device, with all of its verbs.

    Raises:
        StorageError: The file is missing, damaged, not a posterior of sgdgp, or of a
            newer format; or the model is built otherwise (a ValueError).
        TypeError: An argument is of the wrong kind.
    """
    place = path_of(path)
    if not isinstance(model, ExactGP):
        raise TypeError(
            f"model: expected a gpytorch.models.ExactGP for {place}, a posterior, "
            f"found {type(model).__name__}"
        )
    if solver is not None and not isinstance(solver, Solver | str):
        raise TypeError(
            f"solver: expected a Solver such as SDD(), or a name, found {solver!r}"
        )
    contents = read_values(place, KIND)
    with fitting(place, "model"):
        return posterior_from(contents, model, solver)


def posterior_from(
    contents: Contents, model: ExactGP, solver: Solver | str | None = None
) -> Posterior:
    """The posterior behind ``storage.contents_of``; see ``storage.parts_from``."""
    return posterior_of(parts_from(contents, model, solver))
