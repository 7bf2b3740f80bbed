"""Settings that every test shares."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator

# Workers share the cores instead of fighting over them. This has to stand before the
# first import of torch and KeOps: OpenMP reads it once.
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_share = max(1, (os.cpu_count() or 1) // _workers)
_threads = int(os.environ.setdefault("OMP_NUM_THREADS", str(_share)))
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import jaxtyping
import pytest
import torch

from tests import shapes

# What the import hook of ``addopts`` decorates with; before the first import of sgdgp.
jaxtyping.jaxtyped = shapes.jaxtyped

torch.set_num_threads(_threads)
# Before the first import of Triton, whose kernels are wrapped as they are defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Examples are the same in every run: a failure here is a failure everywhere.
hypothesis.settings.register_profile(
    "sgdgp",
    deadline=None,
    derandomize=True,
    max_examples=25,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("sgdgp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests without a GPU."""
    without_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(without_gpu)


@pytest.fixture(autouse=True)
def _errors_as_a_user_sees_them(request: pytest.FixtureRequest) -> Iterator[None]:
    """Switch the shape checker off in tests that expect an error.

    The suite runs with every jaxtyping annotation of sgdgp checked (``addopts``). A
    user has no such checker, so a test with ``pytest.raises`` must meet the error
    that the package itself raises.
    """
    function = getattr(request.node, "function", None)
    if function is None or "raises" not in _names_used(function):
        yield
        return
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def _names_used(function: object) -> tuple[str, ...]:
    """Names that the body of a test refers to, under its decorators."""
    inner = getattr(getattr(function, "hypothesis", None), "inner_test", function)
    code = getattr(inspect.unwrap(inner), "__code__", None)
    return code.co_names if code is not None else ()


@pytest.fixture
def generator() -> torch.Generator:
    """A generator with a fixed seed."""
    return torch.Generator().manual_seed(0)
