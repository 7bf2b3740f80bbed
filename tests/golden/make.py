"""Record what is compared: ``python -m tests.golden.make``.

The data here were made by version 0.1.0 at commit 4752047; run only to add kinds,
never to overwrite. What is recorded is left as it is.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from tests.golden import files, streams, trajectories
from tests.golden.recorded import DATA, add, read


def used(name: str, where: Path) -> dict[str, Any]:
    """What a copy of the files of a kind gives."""
    first = files.file_of(name)
    for place in (DATA / "files").glob(f"{first}*"):
        shutil.copy(place, where)
    return files.KINDS[name].use(where / first)


def main() -> None:
    """Record all cases that are not recorded yet."""
    torch.set_num_threads(1)
    for kind, cases in (
        ("streams", streams.CASES),
        ("trajectories", trajectories.CASES),
    ):
        for name in _missing(kind, cases):
            add(kind, {name: cases[name]()})
    (DATA / "files").mkdir(parents=True, exist_ok=True)
    for name in _missing("files", files.KINDS):
        files.KINDS[name].make(DATA / "files" / files.file_of(name))
        with tempfile.TemporaryDirectory() as where:
            add("files", {name: used(name, Path(where))})


def _missing(kind: str, cases: dict[str, Any]) -> list[str]:
    missing = [name for name in cases if name not in read(kind)]
    for name in missing:
        print(kind, name, file=sys.stderr)
    return missing


if __name__ == "__main__":
    main()
