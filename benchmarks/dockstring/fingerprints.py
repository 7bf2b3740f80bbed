"""Morgan count fingerprints of SMILES by RDKit, an optional package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm

RADIUS = 1
BINS = 1024


def import_rdkit() -> Any:
    """The package.

    Raises:
        ImportError: It is not installed; says how to get it.
    """
    try:
        import rdkit.Chem
        import rdkit.Chem.rdFingerprintGenerator
        import rdkit.rdBase
    except ImportError as error:
        raise ImportError(
            "fingerprints of SMILES need RDKit: pip install 'sgdgp[molecules]' (or pip "
            "install rdkit); --generated N --counts does without"
        ) from error
    return rdkit


def fingerprints(
    smiles: Sequence[str], *, bins: int = BINS, radius: int = RADIUS
) -> Int[Tensor, "n bins"]:
    """How often each circular fragment occurs, folded by identifier modulo bins.

    Args:
        smiles: The molecules (n).
        bins: Length of a fingerprint.
        radius: Bonds around an atom that its largest fragment reaches.

    Returns:
        Counts (n, bins) as int16.

    Raises:
        ImportError: RDKit is not installed.
        ValueError: RDKit cannot read a SMILES; names the first.
    """
    rdkit = import_rdkit()
    generator = rdkit.Chem.rdFingerprintGenerator.GetMorganGenerator(
        radius=radius, fpSize=bins
    )
    out = torch.zeros(len(smiles), bins, dtype=torch.int16)
    # Its own messages about strange molecules would flood the terminal.
    with rdkit.rdBase.BlockLogs():
        for row, text in enumerate(
            tqdm(smiles, desc="fingerprints", disable=None, leave=False)
        ):
            molecule = rdkit.Chem.MolFromSmiles(text)
            if molecule is None:
                raise ValueError(f"smiles: RDKit cannot read {text!r}, number {row}")
            counts = generator.GetCountFingerprint(molecule).GetNonzeroElements()
            if counts:
                places = torch.tensor(list(counts.keys()))
                out[row, places] = torch.tensor(list(counts.values()), dtype=out.dtype)
    return out
