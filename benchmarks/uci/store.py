"""Results on disk: one JSON file per run, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.json_file import write_json
from benchmarks.uci.request import RunRequest


def result_path(folder: Path, request: RunRequest) -> Path:
    """Where the result of a request is kept."""
    return folder / f"{request.stem}.json"


def write_result(folder: Path, request: RunRequest, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    return write_json(result_path(folder, request), result)


def read_result(folder: Path, request: RunRequest) -> dict[str, Any] | None:
    """The stored result of exactly this request, or None."""
    path = result_path(folder, request)
    if not path.exists():
        return None
    result = _read(path)
    return result if result.get("request") == request.to_dict() else None


def read_results(folder: Path) -> list[dict[str, Any]]:
    """All results in a folder, in the order of their file names.

    Raises:
        ValueError: No such folder, or a JSON file that is no result.
    """
    if not folder.is_dir():
        raise ValueError(f"results: found {str(folder)!r}, expected a folder")
    return [_read(path) for path in sorted(folder.glob("*.json"))]


def _read(path: Path) -> dict[str, Any]:
    try:
        result: dict[str, Any] = json.loads(path.read_text())
        request_of(result)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return result


def request_of(result: Mapping[str, Any]) -> RunRequest:
    """The request a stored result answers."""
    return RunRequest(**result["request"])
