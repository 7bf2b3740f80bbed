"""Matrices that other software has written: SciPy, NumPy, MATLAB."""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import scipy  # and scipy.io by its name: most never read a file of MATLAB
import scipy.sparse as sp

from sgdgp.core.codec import MISFITS
from sgdgp.core.errors import StorageError

_DAMAGE = (
    *MISFITS,
    EOFError,
    OSError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What libraries raise for a file that is damaged, or of another kind; beside SciPy's
own error for MATLAB, which is looked up where it is caught."""


def read_matrix(path: str | os.PathLike[str], name: str | None = None) -> Any:
    """The matrix in a file, sparse or dense; nothing in it is executed.

    Args:
        path: Of ``scipy.sparse.save_npz`` or ``numpy.savez`` (.npz), ``numpy.save``
            (.npy), or MATLAB up to version 7 (.mat).
        name: Of the variable, where there are several matrices.

    Raises:
        FileNotFoundError: There is none.
        StorageError: Another kind of file, or not one matrix; says what is in it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path: expected a file, found none at {path}")
    try:
        match path.suffix:
            case ".npy":
                return np.load(path)
            case ".npz":
                with np.load(path) as arrays:
                    if "format" not in arrays:
                        return _only_matrix(dict(arrays), name, path)
                return sp.load_npz(path)
            case ".mat":
                return _only_matrix(scipy.io.loadmat(path), name, path)
    except NotImplementedError as error:
        raise StorageError(
            f"path: {path} is of MATLAB 7.3; save it by save(..., '-v7')"
        ) from error
    except (*_DAMAGE, scipy.io.matlab.MatReadError) as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError(f"path: {path} cannot be read: {error}") from error
    raise StorageError(f"path: expected .npz, .npy or .mat, found {path.name}")


def _only_matrix(variables: Mapping[str, Any], name: str | None, path: Path) -> Any:
    found = {
        key: value
        for key, value in variables.items()
        if sp.issparse(value)
        or (isinstance(value, np.ndarray) and value.ndim == 2 and value.size > 1)
        if not key.startswith("__")
    }
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name in found:
        return found[name]
    listed = ", ".join(f"{k} {v.shape}" for k, v in found.items()) or "none"
    wanted = "one matrix, or its name" if name is None else f"a matrix {name!r}"
    raise StorageError(f"path: expected {wanted} in {path}, found {listed}")
