"""Old names of functions, arguments and modules, accepted for one version."""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def renamed_arguments(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Let a function take arguments by their old names too, with a warning.

    Args:
        **renamed: Old name = "new name".

    Raises:
        TypeError: A call gives an argument by both of its names.

    Example:
        >>> @renamed_arguments(every="checkpoint_every")
        ... def condition(model, *, checkpoint_every=60): ...
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> T:
            for old, new in renamed.items():
                if old not in kwargs:
                    continue
                if new in kwargs:
                    raise TypeError(
                        f"{old}: expected {new} only, its new name, found both"
                    )
                warnings.warn(
                    f"{function.__name__}: the argument {old} is now called {new}; "
                    "the old name goes with version 0.3.",
                    DeprecationWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate


def renamed(old: str, function: Callable[P, T]) -> Callable[P, T]:
    """A function under its old name too, with a warning.

    Args:
        old: The old name.
        function: It, under its new name.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        warnings.warn(
            f"{old} is now called {function.__name__}; the old name goes with version "
            "0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return function(*args, **kwargs)

    return call


def also_importable_as(name: str, module: ModuleType) -> None:
    """A module where it stood in version 0.1.0 too; its names warn there."""

    def look(attribute: str) -> Any:
        if attribute.startswith("__"):  # what the import system asks every module for
            raise AttributeError(attribute)
        warnings.warn(
            f"{name} is now {module.__name__}; the old name goes with version 0.3.",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(module, attribute)

    former = sys.modules[name] = ModuleType(name, module.__doc__)
    vars(former)["__getattr__"] = look
    parent, _, child = name.rpartition(".")
    setattr(sys.modules[parent], child, former)
