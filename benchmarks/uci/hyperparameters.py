"""Kernel hyperparameters for a data set, and the GPyTorch model that holds them.

The papers publish, per data set and split, a noise scale, a signal scale and one
lengthscale per input of a Matern-3/2 kernel. Both scales are standard deviations:
the noise variance is ``noise_scale**2`` and the output scale ``signal_scale**2``.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.uci.data import data_folder
from benchmarks.uci.download import (
    DamagedFileError,
    cache_folder,
    cached_download,
)

_FILE = "published_hyperparameters.json"
_SOURCE = (
    "https://raw.githubusercontent.com/cambridge-mlg/sgd-gp/"
    "890512e7386f52452b28c3e2ab73277090e7551b/"
    "scalable_gps/configs/uci_regression_hparams.txt"
)
_CHECKSUM = "sha256:02a55ba8be1b33b8ffeff5bacff8e93cbdac49308684bc9d71b62afba9fb7e91"


@dataclass(frozen=True)
class Hyperparameters:
    """A Matern-3/2 kernel and its noise, in z-scored units.

    Attributes:
        noise_scale: Standard deviation of the noise.
        signal_scale: Standard deviation of the prior.
        lengthscale: One per input (d,).
    """

    noise_scale: float
    signal_scale: float
    lengthscale: tuple[float, ...]

    def __post_init__(self) -> None:
        for name in ("noise_scale", "signal_scale"):
            _positive(name, getattr(self, name))
        for value in self.lengthscale:
            _positive("lengthscale", value)


def _positive(name: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name}: found {value}, expected a positive number")


def hyperparameters_for(
    source: str, dataset: str, split: int, d: int, *, noise_scale: float | None = None
) -> Hyperparameters:
    """The hyperparameters of one run.

    Args:
        source: ``"published"``; ``"default"`` (noise scale 0.1, signal scale 1, all
            lengthscales sqrt(d): plain values for sets without published ones); or
            the path of a JSON file, name -> split -> noise_scale, signal_scale,
            lengthscale.
        dataset: Name of the data set.
        split: Index of the split.
        d: Number of inputs.
        noise_scale: Replaces the noise standard deviation, as in the papers'
            low-noise rows (0.001).

    Raises:
        ValueError: ``source`` has none for this data set and split, or not d
            lengthscales, or a value that is not positive.
    """
    if source == "default":
        found = Hyperparameters(0.1, 1.0, (math.sqrt(d),) * d)
    else:
        table = published() if source == "published" else _from_file(Path(source))
        found = _look_up(table, source, dataset, split)
    if len(found.lengthscale) != d:
        raise ValueError(
            f"lengthscale: found {len(found.lengthscale)} values for {dataset}, "
            f"expected {d}"
        )
    scale = found.noise_scale if noise_scale is None else noise_scale
    return Hyperparameters(scale, found.signal_scale, found.lengthscale)


def _look_up(
    table: Mapping[str, Any], source: str, dataset: str, split: int
) -> Hyperparameters:
    if dataset not in table:
        raise ValueError(
            f"hyperparameters: {source!r} has none for {dataset!r} (it has "
            f"{', '.join(table)}); try 'default' or the path of a JSON file"
        )
    if str(split) not in table[dataset]:
        raise ValueError(
            f"hyperparameters: {source!r} has none for split {split} of {dataset!r}, "
            f"only for splits {', '.join(table[dataset])}"
        )
    row = table[dataset][str(split)]
    return Hyperparameters(
        float(row["noise_scale"]),
        float(row["signal_scale"]),
        tuple(float(value) for value in row["lengthscale"]),
    )


def published() -> dict[str, Any]:
    """The papers' hyperparameters: name -> split -> values.

    From ``SGDGP_DATA/uci``, else downloaded from the papers' own repository.

    Raises:
        DamagedFileError: The file cannot be read.
        DataUnavailableError: It is not there and cannot be downloaded.
    """
    folder = data_folder()
    if folder is not None and (folder / "uci" / _FILE).exists():
        return _from_file(folder / "uci" / _FILE)
    path = cache_folder() / "uci" / "published_hyperparameters.txt"
    return parse(cached_download(path, [_SOURCE], _CHECKSUM).read_text())


def _from_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(
            f"hyperparameters: found {str(path)!r}, expected 'published', 'default' or "
            "the path of a JSON file"
        )
    try:
        table: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise DamagedFileError(f"{path} is no JSON file: {error}") from error
    return table


_HEADER = re.compile(r"Dataset: (\w+), split (\d+)")
_NUMBER = r"[-+.\w]+"


def parse(text: str) -> dict[str, Any]:
    """Read the papers' text file: printed tuples under ``Dataset: NAME, split K``.

    A split whose values are not finite (the papers skip it) is left out.
    """
    table: dict[str, Any] = {}
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    for header, end in zip(headers, ends, strict=True):
        body = text[header.end() : end]
        values = {
            name: float(_match(rf"{name}=({_NUMBER})", body))
            for name in ("noise_scale", "signal_scale")
        }
        inside = _match(r"length_scale=\w+\(\[([^\]]*)\]", body)
        lengthscale = [float(value) for value in inside.split(",") if value.strip()]
        if all(map(math.isfinite, [*values.values(), *lengthscale])):
            row = {**values, "lengthscale": lengthscale}
            table.setdefault(header[1], {})[header[2]] = row
    return table


def _match(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise DamagedFileError(f"published hyperparameters: no {pattern} in {text!r}")
    return found[1]
