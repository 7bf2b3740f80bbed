"""Results on disk: one JSON file per run, whole or not there at all."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.uci.request import RunRequest


def result_path(folder: Path, request: RunRequest) -> Path:
    """Where the result of a request is kept."""
    return folder / f"{request.stem}.json"


def write_result(folder: Path, request: RunRequest, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, request)
    text = json.dumps(plain(result), indent=1, allow_nan=False)
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def plain(value: Any) -> Any:
    """The value made of what JSON knows."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


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
