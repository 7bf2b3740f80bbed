"""``python -m`` this FOLDER: use the file of every kind and write what comes of it."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.core.stored_kinds import KINDS


def main(folder: str) -> None:
    """What the file of every kind gives goes to "KIND.again"."""
    torch.set_num_threads(1)
    for mark, kind in KINDS.items():
        torch.save(kind.again(Path(folder) / mark), Path(folder) / f"{mark}.again")


if __name__ == "__main__":
    main(sys.argv[1])
