"""What the golden tests share: one thread, no checks of shapes, draws as recorded."""

from __future__ import annotations

from collections.abc import Iterator

import jaxtyping
import pytest
import torch

DRAWN = [32, 31, 49, 22]
"""Four of fifty, weighted, by the torch that numbers were recorded with."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Sums in the same order on every machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _without_the_shape_checker() -> Iterator[None]:
    """Numbers are compared here, and shapes are checked elsewhere: half the time."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _draws_as_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that torch 2.6 draws otherwise: pivots are other ones there, as good."""
    weights = torch.arange(1.0, 51.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    if torch.multinomial(weights, 4, generator=generator).tolist() == DRAWN:
        return

    def stop(*_: object, **__: object) -> None:
        pytest.skip("torch.multinomial of this version draws other pivots")

    monkeypatch.setattr(torch, "multinomial", stop)
