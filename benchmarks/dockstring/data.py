"""Molecules and their docking scores, split as in the paper.

The paper's split puts whole clusters of similar molecules on one side. Scores above
5.0 (failed docking) count as 5.0; molecules without a score are left out.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from benchmarks.uci.download import DamagedFileError

LARGEST_SCORE = 5.0
SIDES = ("train", "test")


@dataclass(frozen=True)
class Molecules:
    """Molecules with scores, one side of the split.

    Attributes:
        smiles: The molecules (n).
        y: Docking scores in kcal/mol, lower is better (n,).
    """

    smiles: tuple[str, ...]
    y: Float[Tensor, " n"]

    def some(self, count: int | None, seed: int) -> Molecules:
        """At most ``count`` of them, drawn at random without replacement."""
        if count is None or count >= len(self.smiles):
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.smiles), generator=generator)[:count]
        return Molecules(tuple(self.smiles[i] for i in order.tolist()), self.y[order])


def read_dockstring(
    dataset: Path, split: Path, target: str
) -> tuple[Molecules, Molecules]:
    """Training and test molecules of one target.

    Args:
        dataset: Table with columns ``inchikey``, ``smiles`` and one per target.
        split: Table with columns ``inchikey`` and ``split`` ("train" or "test").
        target: The column of the scores.

    Raises:
        DamagedFileError: A table is not what it should be; names file and line.
        OSError: A file cannot be read.
    """
    sides = _sides(split)
    smiles: dict[str, list[str]] = {side: [] for side in SIDES}
    scores: dict[str, list[float]] = {side: [] for side in SIDES}
    for line, row in _rows(dataset, ("inchikey", "smiles", target)):
        key, molecule, text = row
        if key not in sides:
            raise DamagedFileError(f"{dataset}, line {line}: {key} is not in {split}")
        score = _score(text, dataset, line)
        if not math.isnan(score):
            smiles[sides[key]].append(molecule)
            scores[sides[key]].append(min(score, LARGEST_SCORE))
    for side in SIDES:
        if not smiles[side]:
            raise DamagedFileError(
                f"{dataset}: no {side} molecule has a {target} score"
            )
    train, test = (
        Molecules(tuple(smiles[side]), torch.tensor(scores[side], dtype=torch.float64))
        for side in SIDES
    )
    return train, test


def _sides(split: Path) -> dict[str, str]:
    """Side of each molecule, by its key."""
    found = {}
    for line, (key, side) in _rows(split, ("inchikey", "split")):
        if side not in SIDES:
            raise DamagedFileError(
                f"{split}, line {line}: found {side!r}, expected 'train' or 'test'"
            )
        found[key] = side
    return found


def _rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Line numbers and the wanted columns of a table separated by tabs."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = csv.reader(file, delimiter="\t")
        header = next(lines, [])
        missing = [column for column in columns if column not in header]
        if missing:
            raise DamagedFileError(
                f"{path} has no column {missing[0]!r}; it has {', '.join(header[:8])}"
            )
        places = [header.index(column) for column in columns]
        for row in lines:
            if len(row) != len(header):
                raise DamagedFileError(
                    f"{path}, line {lines.line_num}: found {len(row)} columns, "
                    f"expected {len(header)}"
                )
            yield lines.line_num, [row[place] for place in places]


def _score(text: str, path: Path, line: int) -> float:
    """A score, NaN where there is none."""
    if not text.strip():
        return math.nan
    try:
        score = float(text)
    except ValueError:
        raise DamagedFileError(
            f"{path}, line {line}: found the score {text!r}, expected a number"
        ) from None
    if math.isinf(score):
        raise DamagedFileError(f"{path}, line {line}: the score is infinite")
    return score
