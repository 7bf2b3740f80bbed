"""What a solve leaves behind comes back with its posterior bit by bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import sgdgp
from sgdgp.bayesopt.record import read_posterior, store_posterior
from sgdgp.solvers import PivotedCholesky
from sgdgp.solvers.preconditioners import Inverse
from sgdgp.solvers.recycling import ExtendedInverse
from tests.posterior.test_warm_start import thompson_data

PRECONDITIONERS = {
    "none": None,
    "low_rank": PivotedCholesky(30),
    "two_level": sgdgp.solvers.TwoLevel(neighbours=8),
}


def updates(solver, count):
    """A model, its posterior after some updates, and data for one more."""
    model, x, y, x_new, y_new = thompson_data(0.4)
    posterior = sgdgp.condition(
        model, x[:300], y[:300], solver=solver, num_samples=3, num_features=100
    )
    for shift in range(count):
        posterior = posterior.update(x_new + 0.1 * shift, y_new)
    return model, posterior, x_new - 0.1, y_new


@pytest.mark.parametrize("name", PRECONDITIONERS)
@pytest.mark.parametrize("count", [0, 2])
def test_an_update_goes_on_from_the_file_as_from_memory(name, count, tmp_path):
    solver = sgdgp.CG(tolerance=1e-4, preconditioner=PRECONDITIONERS[name])
    model, posterior, x_new, y_new = updates(solver, count)
    kept = store_posterior(posterior, tmp_path / "posterior")
    loaded = read_posterior(tmp_path / "posterior", model, solver)
    inverse = loaded.solution.recycled.inverse
    assert isinstance(inverse, ExtendedInverse) == (name != "none" and count > 0)
    found = [one.update(x_new, y_new).solution for one in (kept, loaded)]
    assert found[0].passes == found[1].passes
    assert torch.equal(found[0].weights, found[1].weights)


class Identity(Inverse):
    """A user's preconditioner, which no file can hold."""

    passes = 0.0
    settings = {}  # noqa: RUF012

    def __call__(self, r):
        return r


def test_a_preconditioner_that_cannot_be_stored_is_left_out(tmp_path):
    model, posterior, _, _ = updates(sgdgp.CG(tolerance=1e-2), 0)
    recycled = replace(posterior.solution.recycled, inverse=Identity())
    part = replace(
        posterior.parts[0], solution=replace(posterior.solution, recycled=recycled)
    )
    kept = store_posterior(replace(posterior, solved=(part,)), tmp_path / "one")
    assert kept.solution.recycled is None
    loaded = read_posterior(tmp_path / "one", model, "auto")
    assert loaded.solution.recycled is None
