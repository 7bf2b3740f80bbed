"""Tensors come back from a file as they were, whatever their strides."""

from __future__ import annotations

import pytest
import torch

from sgdgp.core.files import FileKind, read_file, write_file

KIND = FileKind("test", 1, "test")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).as_strided((1,), (0,)),
        torch.arange(3.0).expand(4, 3),
        torch.arange(6).reshape(2, 3).mT,
        torch.tensor(2.0),
        torch.empty(0, 3),
        torch.ones(3, dtype=torch.bfloat16),
    ],
    ids=["one_element_expanded", "expanded", "transposed", "number", "empty", "half"],
)
def test_a_tensor_of_any_strides_comes_back(tensor, tmp_path):
    write_file(tmp_path / "file", KIND, {"tensor": tensor}, {"word": "x"})
    found, state = read_file(tmp_path / "file", KIND)
    assert torch.equal(found["tensor"], tensor)
    assert found["tensor"].dtype == tensor.dtype
    assert state == {"word": "x"}
