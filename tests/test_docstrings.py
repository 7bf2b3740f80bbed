"""Every public method has a docstring, its own or that of the method it overrides."""

from __future__ import annotations

import importlib
import inspect
import pkgutil

import pytest

import sgdgp

MODULES = [
    module.name for module in pkgutil.walk_packages(sgdgp.__path__, prefix="sgdgp.")
]


@pytest.mark.parametrize("name", MODULES)
def test_public_methods_are_documented(name: str):
    if name == "sgdgp.operators.triton_kernel":
        pytest.importorskip("triton", reason="made for Linux")
    module = importlib.import_module(name)
    undocumented = [
        f"{owner.__qualname__}.{method}"
        for owner in vars(module).values()
        if inspect.isclass(owner) and owner.__module__ == name
        for method, value in vars(owner).items()
        if not method.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property))
        and not inspect.getdoc(getattr(owner, method))
    ]
    assert undocumented == []
