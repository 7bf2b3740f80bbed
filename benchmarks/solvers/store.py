"""Results on disk: one JSON file per run, whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.json_file import plain, write_json
from benchmarks.solvers.request import RaceRequest


def write_result(folder: Path, request: RaceRequest, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    content = {**result, "request": request.to_dict()}
    return write_json(folder / f"{request.stem}.json", content)


def read_result(folder: Path, request: RaceRequest) -> dict[str, Any] | None:
    """The stored result of exactly this request, or None.

    Raises:
        ValueError: The file is there and cannot be read.
    """
    path = folder / f"{request.stem}.json"
    if not path.exists():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return result if result.get("request") == plain(request.to_dict()) else None
