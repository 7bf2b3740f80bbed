"""``python -m`` this FOLDER: load posterior files and write what they predict."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sgdgp import load
from tests.posterior.stored_posteriors import BUILD, predictions


def main(folder: str) -> None:
    """Predictions of every file "NAME.posterior" in the folder go to "NAME.again"."""
    torch.set_num_threads(1)
    for path in sorted(Path(folder).glob("*.posterior")):
        # Other parameters and other data: the file's are meant to take their place.
        posterior = load(path, BUILD[path.stem](seed=9))
        save_file(predictions(posterior, path.stem), path.with_suffix(".again"))


if __name__ == "__main__":
    main(sys.argv[1])
