"""The checker of shapes: what jaxtyping's own does, in a fraction of its time.

``jaxtyping.jaxtyped`` lets beartype look at the arguments of a call twice and binds
them with ``inspect`` before. That was up to half the time of the tests. Here one look
at arguments and result, in one scope of axis names, does the same.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_strict = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
_scope = jaxtyping.jaxtyped("context")
_LEFT_ALONE = {"sgdgp.operators.triton_kernel"}
"""Triton reads the source of what it decorates, and runs it in its globals."""


def jaxtyped(fn: Any = None, *, typechecker: object = None) -> Any:
    """Stands for ``jaxtyping.jaxtyped`` in the modules that its import hook loads."""
    if fn is None:
        return jaxtyped
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn) and "__init__" in vars(fn):
            fn.__init__ = jaxtyped(fn.__init__)
        return fn
    if getattr(fn, "__module__", None) in _LEFT_ALONE:
        return fn
    if isinstance(fn, (classmethod, staticmethod)):
        return type(fn)(jaxtyped(fn.__func__))
    if isinstance(fn, property):
        return property(*(f and jaxtyped(f) for f in (fn.fget, fn.fset, fn.fdel)))
    hinted = _with_hints(fn)
    shapes = any("jaxtyping" in repr(hint) for hint in hinted.__annotations__.values())
    strict = None

    @functools.wraps(fn)
    def checked(*args: Any, **kwargs: Any) -> Any:
        nonlocal strict
        if flags.get("__no_type_check__") or jaxtyping.config.jaxtyping_disable:
            return fn(*args, **kwargs)
        if strict is None:  # many are never called
            strict = _strict(hinted)
        if not shapes:
            return strict(*args, **kwargs)
        with _scope:
            return strict(*args, **kwargs)

    # Not the function itself: functions inside of others would be cycles.
    flags = vars(checked)
    return checked


def _with_hints(fn: types.FunctionType) -> types.FunctionType:
    """A copy whose annotations are types, where the module knows them, not strings."""
    copy = types.FunctionType(
        fn.__code__, fn.__globals__, fn.__name__, fn.__defaults__, fn.__closure__
    )
    copy.__kwdefaults__ = fn.__kwdefaults__
    copy.__qualname__ = fn.__qualname__
    copy.__annotations__ = {
        name: _hint(hint, fn.__globals__) for name, hint in fn.__annotations__.items()
    }
    return copy


def _hint(hint: Any, names: dict[str, Any]) -> Any:
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, names)
    except Exception:  # not defined yet: unchecked, as with jaxtyping
        return Any
