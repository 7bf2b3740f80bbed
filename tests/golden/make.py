"""Record what is compared: ``python -m tests.golden.make``.

The data here were made by version 0.1.0 at commit 4752047; run only to add kinds,
never to overwrite. What is recorded is left as it is.
"""

from __future__ import annotations

import sys

import torch

from tests.golden import trajectories
from tests.golden.recorded import add, read


def main() -> None:
    """Record all cases that are not recorded yet."""
    torch.set_num_threads(1)
    for kind, cases in {"trajectories": trajectories.CASES}.items():
        missing = [name for name in cases if name not in read(kind)]
        for name in missing:
            print(kind, name, file=sys.stderr)
            add(kind, {name: cases[name]()})


if __name__ == "__main__":
    main()
