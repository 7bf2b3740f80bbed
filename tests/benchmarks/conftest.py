"""A tiny data set in a folder with the layout of ``SGDGP_DATA``."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest


@dataclass(frozen=True)
class TinyData:
    """One set "tiny" and its hyperparameters for splits 0 and 1.

    Three inputs, the last of them constant, and a noisy smooth target.
    """

    folder: Path
    noise_scale: float = 0.2
    signal_scale: float = 1.1
    lengthscale: tuple[float, ...] = (0.8, 1.5, 1.0)

    @staticmethod
    def table(n: int = 90) -> np.ndarray:
        random = np.random.default_rng(0)
        x = random.uniform(-3.0, 5.0, size=(n, 2))
        y = 10.0 + 4.0 * np.sin(x[:, 0]) + x[:, 1] + 0.5 * random.normal(size=n)
        return np.column_stack([x, np.full(n, 0.1), y])

    @staticmethod
    def mask(n: int = 90) -> np.ndarray:
        return (np.arange(n)[:, None] % 10 == np.arange(10)).astype(int)

    def write(
        self,
        name: str,
        table: np.ndarray | None = None,
        mask: np.ndarray | None = None,
    ) -> Path:
        """Write a set into the folder; the path of its data file."""
        base = self.folder / "uci" / name
        base.mkdir(parents=True, exist_ok=True)
        arrays = {
            "test_mask": (self.mask() if mask is None else mask, "%d"),
            "data": (self.table() if table is None else table, "%.10g"),
        }
        for file, (array, form) in arrays.items():
            with gzip.open(base / f"{file}.csv.gz", "wt") as out:
                np.savetxt(out, array, delimiter=",", fmt=form)
        return base / "data.csv.gz"


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TinyData:
    """``SGDGP_DATA`` with the one set "tiny" (90 rows, 3 inputs)."""
    data = TinyData(tmp_path / "data")
    data.write("tiny")
    row = {
        "noise_scale": data.noise_scale,
        "signal_scale": data.signal_scale,
        "lengthscale": data.lengthscale,
    }
    path = data.folder / "uci" / "published_hyperparameters.json"
    path.write_text(json.dumps({"tiny": {"0": row, "1": row}}))
    monkeypatch.setenv("SGDGP_DATA", str(data.folder))
    monkeypatch.setenv("SGDGP_CACHE", str(tmp_path / "cache"))
    return data
