"""What makes two models the same one, and how differences are told."""

from __future__ import annotations

import torch
from gpytorch.kernels import MaternKernel, RBFKernel, ScaleKernel

from sgdgp.core.hashes import (
    differences,
    digest,
    former_structure_of,
    in_words,
    structure_of,
)
from sgdgp.kernels import TanimotoKernel


class Moved(MaternKernel):
    """A kernel that has found another home."""


Moved.__qualname__ = "MaternKernel"


def test_a_structure_is_names_and_plain_attributes_not_modules():
    one, other = (ScaleKernel(kind(nu=1.5)) for kind in (MaternKernel, Moved))
    assert structure_of(one) == structure_of(other)
    assert former_structure_of(one) != former_structure_of(other)
    for changed in (ScaleKernel(MaternKernel(nu=2.5)), ScaleKernel(RBFKernel())):
        assert structure_of(changed) != structure_of(one)
        assert structure_of(changed).keys() == structure_of(one).keys()


def test_what_0_1_0_hashed_does_not_depend_on_where_a_kernel_stands(monkeypatch):
    before = former_structure_of(TanimotoKernel())
    monkeypatch.setattr(TanimotoKernel, "__module__", "sgdgp.kernels.elsewhere")
    assert former_structure_of(TanimotoKernel()) == before
    # As commit 4752047 has it.
    words = f"sgdgp.kernels.tanimoto.TanimotoKernel {[]}"
    plain = torch.nn.Module()
    plain.__class__ = type(
        "TanimotoKernel", (torch.nn.Module,), {"__module__": "sgdgp.kernels.tanimoto"}
    )
    assert former_structure_of(plain)["structure of the model"] == digest(words)


def test_differences_say_what_can_be_read_first():
    stored = {
        "x": digest(1),
        "count": "3",
        "w": f"float32 (2,) {digest(2)}",
        "old": "a",
    }
    here = {"x": digest(4), "count": "5", "w": f"float32 (2,) {digest(3)}", "new": "b"}
    assert differences(stored, stored) == []
    assert differences(stored, here) == [
        "count is 5, expected 3",
        "old is only in the file",
        "new is only here",
        "x",
        "w",
    ]
    here["w"] = f"float64 (2,) {digest(2)}"
    assert "w is float64 (2,), expected float32 (2,)" in differences(stored, here)


def test_five_of_them_are_told():
    assert in_words([*"abcde"]) == "a; b; c; d; e"
    assert in_words([*"abcdefg"]) == "a; b; c; d; e; and 2 more"
