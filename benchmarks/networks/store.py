"""Results on disk: one JSON file per setting and seed, growing method by method."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.uci.store import plain

Result: TypeAlias = dict[str, Any]
FORMAT = 1


def result_path(folder: Path, setting: str, seed: int) -> Path:
    """Where a setting and seed are kept."""
    return folder / f"{setting}-{seed}.json"


def empty_result(setting: str, seed: int) -> Result:
    """A result without methods."""
    return {"format": FORMAT, "setting": setting, "seed": seed, "methods": {}}


def read_result(folder: Path, setting: str, seed: int) -> Result:
    """What there is of a setting and seed; an empty result if nothing.

    Raises:
        ValueError: The file is no result of this benchmark.
    """
    path = result_path(folder, setting, seed)
    return _read(path) if path.exists() else empty_result(setting, seed)


def read_results(folder: Path) -> list[Result]:
    """All results of a folder, by setting and seed; other files may lie beside them.

    Raises:
        ValueError: No such folder, or a JSON file that is no result.
    """
    if not folder.is_dir():
        raise ValueError(f"results: found {str(folder)!r}, expected a folder")
    results = [_read(path) for path in folder.glob("*-[0-9]*.json")]
    return sorted(results, key=lambda result: (result["setting"], result["seed"]))


def write_result(folder: Path, result: Mapping[str, Any]) -> Path:
    """Write a result atomically; NaN and infinities become null."""
    folder.mkdir(parents=True, exist_ok=True)
    path = result_path(folder, result["setting"], result["seed"])
    handle, name = tempfile.mkstemp(dir=folder, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(json.dumps(plain(result), indent=1, allow_nan=False) + "\n")
        Path(name).chmod(0o644)
        Path(name).replace(path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text())
        if result["format"] != FORMAT or not isinstance(result["methods"], dict):
            raise ValueError(f"format {result['format']!r}, expected {FORMAT}")
        str(result["setting"]), int(result["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return result
