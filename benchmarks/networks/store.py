"""Results on disk: one JSON file per setting and seed, growing method by method."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from benchmarks.json_file import write_json

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
    return write_json(result_path(folder, result["setting"], result["seed"]), result)


def _read(path: Path) -> Result:
    try:
        result: Result = json.loads(path.read_text())
        if result["format"] != FORMAT or not isinstance(result["methods"], dict):
            raise ValueError(f"format {result['format']!r}, expected {FORMAT}")
        str(result["setting"]), int(result["seed"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no result of this benchmark: {error}") from error
    return result
