"""What a solve leaves behind comes back from its file bit by bit."""

from __future__ import annotations

import pytest
import torch

import sgdgp
from sgdgp.core.errors import UnusableFileError
from sgdgp.posterior.carried_state import load_carried, parts_of, save_carried, settled
from sgdgp.solvers import PivotedCholesky
from sgdgp.solvers.recycling import ExtendedInverse
from tests.posterior.test_warm_start import thompson_data

PRECONDITIONERS = {
    "none": None,
    "low_rank": PivotedCholesky(30),
    "two_level": sgdgp.solvers.TwoLevel(neighbours=8),
}


def updates(solver, count):
    """A posterior after some updates, and data for one more."""
    model, x, y, x_new, y_new = thompson_data(0.4)
    posterior = sgdgp.condition(
        model, x[:300], y[:300], solver=solver, num_samples=3, num_features=100
    )
    for shift in range(count):
        posterior = posterior.update(x_new + 0.1 * shift, y_new)
    return posterior, x_new - 0.1, y_new


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("count", [0, 2])
def test_an_update_goes_on_from_the_file_as_from_memory(name, count, tmp_path):
    solver = sgdgp.CG(tolerance=1e-4, preconditioner=PRECONDITIONERS[name])
    posterior, x_new, y_new = updates(solver, count)
    carried = settled(posterior.solution.recycled)
    save_carried(tmp_path / "carried", posterior.solution.recycled)
    loaded = load_carried(tmp_path / "carried")
    assert isinstance(loaded.inverse, ExtendedInverse) == (name != "none" and count > 0)
    found = []
    for state in (carried, loaded):
        object.__setattr__(posterior.solution, "carried", state)
        found.append(posterior.update(x_new, y_new).solution)
    assert found[0].passes == found[1].passes
    assert torch.equal(found[0].weights, found[1].weights)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "carried"
    posterior, _, _ = updates(sgdgp.CG(tolerance=1e-2), 0)
    save_carried(path, posterior.solution.recycled)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UnusableFileError, match="checksum"):
        load_carried(path)


def test_an_unknown_preconditioner_is_named():
    with pytest.raises(TypeError, match="str"):
        parts_of.dispatch(object)("text")
