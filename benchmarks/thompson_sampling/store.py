"""Results on disk: one JSON file per run, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.json_file import write_json
from benchmarks.thompson_sampling.request import Request

Result: TypeAlias = dict[str, Any]
_NAMES = "*-*-*-*.json"  # those of ``Request.stem``


def write_result(folder: Path, request: Request, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    return write_json(folder / f"{request.stem}.json", result)


def read_result(folder: Path, request: Request) -> Result | None:
    """The stored result of exactly this request, or None."""
    path = folder / f"{request.stem}.json"
    if not path.exists():
        return None
    result = _read(path)
    return result if result["request"] == request.to_dict() else None


def read_results(folder: Path) -> list[Result]:
    """All results in a folder, by method, lengthscale and seed.

    Files of other names, such as those of ``maximise.py``, may lie beside them.

    Raises:
        ValueError: No such folder, or a JSON file that is no result.
    """
    if not folder.is_dir():
        raise ValueError(f"results: found {str(folder)!r}, expected a folder")
    return [_read(path) for path in sorted(folder.glob(_NAMES))]


def request_of(result: Mapping[str, Any]) -> Request:
    """The request that a stored result answers."""
    return Request(**result["request"])


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text())
        request_of(result)
        if not isinstance(result["history"], list):
            raise ValueError("history is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return result
