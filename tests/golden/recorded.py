"""Numbers that were recorded once, and how what is found today is compared."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DATA = Path(__file__).parent / "data"


DIGITS = 12
"""Of recorded fractions: more than any comparison needs."""


def numbers_of(value: Any) -> Any:
    """What JSON can hold of a value."""
    if isinstance(value, Tensor):
        return value.detach().cpu().tolist()
    if isinstance(value, Mapping):
        return {str(key): numbers_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [numbers_of(item) for item in value]
    return value


def read(name: str) -> dict[str, Any]:
    """The recorded cases of one kind, by name; none if there is no file yet."""
    place = DATA / f"{name}.json"
    return json.loads(place.read_text()) if place.exists() else {}


def add(name: str, cases: Mapping[str, Any]) -> None:
    """Write cases that are not recorded yet; what is recorded stays as it is."""
    everything = {**_rounded(numbers_of(cases)), **read(name)}
    lines = [
        f"{json.dumps(case)}: {json.dumps(everything[case])}"
        for case in sorted(everything)
    ]
    (DATA / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


ROUNDING = 0.0 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 1e-5
"""What comparisons allow at least, relative and absolute, on a processor without the
instructions that numbers were recorded with. Sums are rounded otherwise there, and
conjugate gradients made up to 5e-6 of 1e-16 on their way."""

MOVED = {"passes_from_zero"}
"""Names in what version 0.1.0 recorded that are kept elsewhere by now."""


def assert_same(
    found: Any, recorded: Any, *, rtol: float, atol: float = 0.0, where: str = "value"
) -> None:
    """Compare what was found with what was recorded; says where they differ.

    Words, whole numbers and structure have to agree exactly. Fractions agree within
    ``rtol`` of the largest in the same list, or ``atol``; or ``ROUNDING``.

    Args:
        found: Tensors, numbers, words, lists and mappings of them.
        recorded: The same as JSON gave it back.
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        where: Name of the value in messages.
    """
    found = numbers_of(found)
    if isinstance(recorded, dict):
        assert isinstance(found, dict), where
        assert found.keys() ^ recorded.keys() <= MOVED, f"{where}: other names"
        for key in recorded.keys() - MOVED:
            item = recorded[key]
            inside = f"{where}[{key!r}]"
            assert_same(found[key], item, rtol=rtol, atol=atol, where=inside)
    elif isinstance(recorded, list) and not _is_numeric(recorded):
        assert isinstance(found, list), where
        assert len(found) == len(recorded), f"{where}: {len(found)} entries"
        for i, (one, other) in enumerate(zip(found, recorded, strict=True)):
            assert_same(one, other, rtol=rtol, atol=atol, where=f"{where}[{i}]")
    elif _is_fraction(recorded) or isinstance(recorded, list):
        _assert_close(found, recorded, rtol, atol, where)
    else:
        assert found == recorded, f"{where}: found {found!r}, recorded {recorded!r}"


def _assert_close(
    found: Any, recorded: Any, rtol: float, atol: float, where: str
) -> None:
    rtol, atol = max(rtol, ROUNDING), max(atol, ROUNDING)
    one = torch.as_tensor(found, dtype=torch.float64)
    other = torch.as_tensor(recorded, dtype=torch.float64)
    assert one.shape == other.shape, f"{where}: found shape {tuple(one.shape)}"
    finite = other.isfinite()
    # A scale of its own for every row of a matrix, as for every history entry.
    size = torch.where(finite, other.abs(), 0.0)
    size = size.amax(-1, keepdim=True) if size.ndim and size.numel() else size
    gap = torch.where(finite, (one - other).abs(), 0.0)
    same = (gap <= rtol * size + atol).all() and torch.equal(
        torch.where(finite, 0.0, one).nan_to_num(7.0, 8.0, 9.0),
        torch.where(finite, 0.0, other).nan_to_num(7.0, 8.0, 9.0),
    )
    worst = float((gap / size.clamp_min(1e-300)).max()) if gap.numel() else math.nan
    assert bool(same), f"{where}: relative difference {worst:.2e}, allowed {rtol:.0e}"


def _is_fraction(value: Any) -> bool:
    return isinstance(value, float)


def _is_numeric(value: Any) -> bool:
    """Whether this is a list of numbers, or of such lists, some not whole."""
    leaves = list(_leaves(value))
    return (
        bool(leaves)
        and all(isinstance(leaf, float | int) for leaf in leaves)
        and not any(isinstance(leaf, bool) for leaf in leaves)
        and any(isinstance(leaf, float) for leaf in leaves)
        and _is_rectangular(value)
    )


def _leaves(value: Any) -> Any:
    if isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def _is_rectangular(value: list[Any]) -> bool:
    inner = [item for item in value if isinstance(item, list)]
    if not inner:
        return True
    same = len(inner) == len(value) and len({len(item) for item in inner}) == 1
    return same and all(_is_rectangular(item) for item in inner)
