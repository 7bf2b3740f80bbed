"""What goes wrong, by name: every error of this package is an ``SgdgpError``.

Each is a built-in error too, so that code which catches ``ValueError`` keeps working.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType


class SgdgpError(Exception):
    """Any error that sgdgp raises under a name of its own."""


class UnsupportedModelError(SgdgpError, ValueError):
    """The model's prior cannot be read as one kernel between pairs of points."""


class StorageError(SgdgpError, ValueError):
    """A file cannot be written or used, or not with this model; says which and why."""


class CheckpointError(SgdgpError, ValueError):
    """A checkpoint file cannot be used; the message says which, why and what to do."""


class NotStorableError(SgdgpError, TypeError):
    """An object is of a class that was not registered for storage."""


def warn_user(message: str) -> None:
    """Warn at the line of the user: the innermost that is not of this package."""
    frame: FrameType | None = sys._getframe()
    level = 0
    while frame is not None and _is_ours(frame):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level + 1)


def _is_ours(frame: FrameType) -> bool:
    name = str(frame.f_globals.get("__name__"))
    # Functions of this package under torch.no_grad are called from there.
    return name.partition(".")[0] == "sgdgp" or name == "torch.utils._contextlib"
