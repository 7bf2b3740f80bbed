"""Work that survives the end of its process: one file that is read, then rewritten.

What is kept differs from room to room; what makes a file trustworthy does not, and is
here. A file belongs to one piece of work by its *components*, hashes and words of all
that is given, and is refused, and left as it is, where they differ.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch

from sgdgp.core.checks import check_number, check_positive
from sgdgp.core.codec import MISFITS, Contents, read_values, write_values
from sgdgp.core.errors import CheckpointError, StorageError
from sgdgp.core.files import FileKind, path_of, place_of
from sgdgp.core.hashes import differences, in_words

C = TypeVar("C", bound="Checkpoint")

_ADVICE = (
    "It is left as it is: restore what was used when it was written, or delete it or "
    "give another path to start anew."
)

_SPELT = {"optimiser": "optimizer"}
"""What components are called now; files before version 0.2 have the former names."""


def check_every(every: Any) -> None:
    """Refuse a ``checkpoint_every`` that is no positive number of seconds."""
    check_number("checkpoint_every", every, "seconds")
    check_positive("checkpoint_every", every)


class Checkpoint:
    """The file of one piece of work: ``open`` it once, then ``write`` now and then.

    Args:
        path: The file; its directory must exist.
        every: Seconds between two writes that nothing asks for, at least.

    Attributes:
        kind: What the file is.
        work: What it belongs to, as users call it: "problem", "fit", "run".
        path: The file.
        components: What the work at hand is made of, as it is written.
        problem: Why the last write failed; None if it did not. A full disk does not
            end work of hours.

    Raises:
        CheckpointError: Nothing can be written at ``path``.
        TypeError: ``path`` is no path or ``every`` no number.
        ValueError: ``every`` is not positive and finite.
    """

    kind: ClassVar[FileKind]
    work: ClassVar[str]

    def __init__(self, path: str | os.PathLike[str], every: int | float) -> None:
        path_of(path, "checkpoint")
        check_every(every)
        self.path = place_of(path, "checkpoint", CheckpointError)
        self.problem: str | None = None
        self._every = every
        self.components: dict[str, str] = {}
        self.wait()

    @classmethod
    def at(
        cls: type[C], path: str | os.PathLike[str] | None, every: int | float
    ) -> C | None:
        """The file at ``path``, or None; ``every`` is checked for both."""
        check_every(every)
        return None if path is None else cls(path, every)

    @property
    def is_due(self) -> bool:
        """Whether it is time for another write."""
        return time.monotonic() >= self._next

    def wait(self) -> None:
        """Let ``every`` seconds pass before it is time again."""
        self._next = time.monotonic() + self._every

    def open(
        self,
        components: Mapping[str, str],
        formerly: Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
    ) -> Contents | None:
        """What the file holds; None if there is no file.

        Args:
            components: What the work at hand is made of.
            formerly: What version 0.1.0 called some of them.
            device: Where tensors go.

        Raises:
            CheckpointError: The file is damaged, foreign, of a newer format or of
                other work.
        """
        self.components = dict(components)
        if not self.path.exists():
            return None
        with self.reading():
            found = read_values(self.path, self.kind, device)
            stored = {
                name: self.components[name] if value == here else value
                for spelt, value in found["components"].items()
                for name in [_SPELT.get(spelt, spelt)]
                for here in [(formerly or {}).get(name)]
            }
            self.refuse(differences(stored, self.components))
        return found

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What goes wrong in here is the file's fault, and said so.

        Raises:
            CheckpointError: Anything went wrong.
        """
        try:
            yield
        except CheckpointError:
            raise
        except StorageError as error:
            raise CheckpointError(f"checkpoint: {error}. {_ADVICE}") from error
        except MISFITS as error:
            raise CheckpointError(
                f"checkpoint: {self.path} is damaged, or not a {self.kind.words} of "
                f"this version of sgdgp ({error}). {_ADVICE}"
            ) from error

    def refuse(self, differing: list[str]) -> None:
        """Refuse the file if anything differs.

        Raises:
            CheckpointError: Names the first things.
        """
        if differing:
            raise CheckpointError(
                f"checkpoint: {self.path} belongs to another {self.work}. Different "
                f"here: {in_words(differing)}. {_ADVICE}"
            )

    def write(self, **values: Any) -> None:
        """Put a new file in the place of the old one; see ``problem``."""
        self.problem = None
        try:
            write_values(
                self.path, self.kind, {"components": self.components, **values}
            )
        except OSError as error:
            self.problem = (
                f"The checkpoint {self.path} could not be written ({error}); it holds "
                "an earlier state, or nothing."
            )
        self.wait()
