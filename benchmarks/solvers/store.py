"""Results on disk: one JSON file per run, whole or not there at all."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.solvers.request import RaceRequest
from benchmarks.uci.store import plain


def write_result(folder: Path, request: RaceRequest, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{request.stem}.json"
    text = json.dumps(
        plain({**result, "request": request.to_dict()}), indent=1, allow_nan=False
    )
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


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
