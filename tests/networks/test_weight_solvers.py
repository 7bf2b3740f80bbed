"""Solvers of the posterior precision against dense solutions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from sgdgp.core.processes import Processes
from sgdgp.networks import (
    Bernoulli,
    Categorical,
    Dual,
    Gaussian,
    GPrior,
    Isotropic,
    Kronecker,
    Layerwise,
    WeightCG,
    WeightCholesky,
    WeightSGD,
    curvature,
    weight_solvers,
)
from sgdgp.networks.curvature import TangentData, WeightSystem, curvature_probes
from sgdgp.networks.linearisation import chosen_solver
from sgdgp.networks.priors.base import no_probes
from sgdgp.networks.stream import stream_of
from sgdgp.networks.weight_solvers import largest_batch_eigenvalue, relative_errors
from sgdgp.solvers.conjugate_gradients import BlockRecurrence
from sgdgp.tangent import Tangent
from tests.networks.dense import columns, tiny_system
from tests.networks.kinds import inputs_of, network_of

SOLVERS = {
    "cholesky": WeightCholesky(tolerance=1e-9),
    "cg": WeightCG(tolerance=1e-5),
    "preconditioned": WeightCG(tolerance=1e-5, rank=6),
    "sgd": WeightSGD(tolerance=0.1, max_passes=500.0),
    "dual": Dual(tolerance=1e-2),
}
"""One of each; a new one gets all the statements below."""

STEPS_TOO_LONG = WeightSGD(tolerance=0.2, max_passes=500.0, step_size=0.1)


def exact(features, rhs):
    matrix = features.T @ features
    matrix.diagonal().add_(1.0)
    return torch.linalg.solve(matrix, rhs)


@pytest.fixture(params=SOLVERS)
def solver(request):
    return SOLVERS[request.param]


@pytest.fixture(params=[5, 12], ids=["tall", "wide"])
def hidden(request):
    """Units of a network with fewer weights than rows, or more."""
    return request.param


@pytest.mark.parametrize(
    "solver",
    [*SOLVERS.values(), STEPS_TOO_LONG],
    ids=[*SOLVERS, "sgd, steps too long"],
)
def test_solutions_are_as_near_as_they_claim(solver, hidden):
    system, features, _, _ = tiny_system(hidden=hidden)
    prior = columns(system.num_weights, 4)
    rhs = system.noise(range(4), seed=0) + prior
    found = solver.solve(system, rhs, prior, seed=1)
    assert found.reason == "converged"
    truth = exact(features, rhs)
    wrong = (found.weights - truth).norm(dim=0)
    rounding = 1e-13 * truth.norm(dim=0)
    assert bool((wrong <= 1.001 * found.residuals.norm(dim=0) + rounding).all())
    assert bool((wrong <= solver.tolerance * found.weights.norm(dim=0)).all())
    outputs = (features @ (found.weights - truth)).norm(dim=0)
    scale = (features @ found.weights).norm(dim=0)
    assert bool((outputs <= 0.5 * solver.tolerance * scale * 1.001).all())
    torch.testing.assert_close(found.residuals, system.residual(rhs, found.weights))
    torch.testing.assert_close(found.images(), features.T @ (features @ found.weights))


def test_errors_are_measured_against_the_smaller_of_weights_and_outputs():
    system, features, _, _ = tiny_system()
    v = columns(system.num_weights, 2)
    rhs = columns(system.num_weights, 2, seed=8)
    residuals = rhs - v - features.T @ (features @ v)
    expected = residuals.norm(dim=0) / torch.minimum(
        v.norm(dim=0), (features @ v).norm(dim=0)
    )
    torch.testing.assert_close(relative_errors(rhs, v, residuals), expected)


def test_a_solution_costs_nothing_more(solver, hidden):
    system, features, _, _ = tiny_system(hidden=hidden)
    rhs = columns(system.num_weights, 2)
    found = solver.solve(system, rhs, exact(features, rhs))
    # But for the batches that SGD takes its step size from.
    more = 0.0 if not isinstance(solver, WeightSGD) else 24 / 4
    if isinstance(solver, WeightCholesky) and hidden == 12:
        more = 2.0  # rows take a pass for the solution, and one for its residuals
    assert found.passes == 1.0 + more
    assert found.reason == "converged"


def test_budgets_are_kept_and_reported(solver, hidden):
    system, _, _, _ = tiny_system(hidden=hidden)
    rhs = columns(system.num_weights, 2)
    hard = replace(solver, tolerance=1e-12, max_passes=9.0)
    found = hard.solve(system, rhs, torch.zeros_like(rhs))
    # A factorisation needs one pass, or three, and no more.
    direct = isinstance(solver, WeightCholesky)
    assert found.reason == ("converged" if direct else "budget")
    # Solvers of the dual finish the step that they are in.
    assert found.passes <= 9.0 + (2.0 if isinstance(solver, Dual) else 0.0)


def test_a_recursion_that_has_drifted_is_corrected(monkeypatch):
    class Drifting(BlockRecurrence):
        steps = 0

        def step(self, rhs=None):
            super().step(rhs)
            self.steps += 1
            if self.steps == 2:
                # So far that the residuals belong to no positive |phi v|^2.
                self.residual += 10.0 * self.residual.norm(dim=0) * self.weights

    monkeypatch.setattr(weight_solvers, "BlockRecurrence", Drifting)
    system, features, _, _ = tiny_system()
    rhs = columns(system.num_weights, 2)
    found = WeightCG(1e-6).solve(system, rhs, torch.zeros_like(rhs))
    assert found.reason == "converged"
    assert found.passes < 60.0
    torch.testing.assert_close(
        found.weights, exact(features, rhs), rtol=1e-5, atol=1e-5
    )


def test_a_callback_can_stop_a_solve(solver):
    system, _, _, _ = tiny_system()
    rhs = columns(system.num_weights, 2)
    seen = []

    def stop(progress):
        seen.append((progress.residuals.shape, progress.weights().shape))
        return True

    hard = replace(solver, tolerance=1e-9)
    found = hard.solve(system, rhs, torch.zeros_like(rhs), callback=stop)
    assert found.reason == "interrupted"
    assert seen == [((2,), rhs.shape)]


@pytest.mark.parametrize("kept", [0, 2**20], ids=["batches", "kept"])
def test_the_gram_matrix_is_that_of_the_features(monkeypatch, kept):
    monkeypatch.setattr(curvature, "_KEPT_NUMBERS", kept)
    system, features, _, _ = tiny_system()
    assert (system.data._kept is None) == (kept == 0)
    torch.testing.assert_close(system.gram, features.T @ features)
    v = columns(system.num_weights, 3)
    torch.testing.assert_close(system.product(v), features.T @ (features @ v))
    for batch in system.data.stream:
        rows = features.view(-1, 3, features.shape[1])[batch.rows].flatten(0, 1)
        expected = rows.T @ (rows @ v)
        torch.testing.assert_close(system.batch_product(batch, v), expected)


def test_a_factorisation_draws_the_samples_of_others_and_knows_the_dimension(hidden):
    system, features, _, _ = tiny_system(hidden=hidden)
    start = torch.zeros(system.num_weights, 4, dtype=torch.float64)
    one, other = (
        solver.draw(system, range(4), start, seed=3)
        for solver in (WeightCholesky(), WeightCG(tolerance=1e-12))
    )
    torch.testing.assert_close(one.weights, other.weights, rtol=1e-9, atol=1e-9)
    spectrum = torch.linalg.svdvals(features).square()
    found = WeightCholesky().dimension(system, seed=3)
    assert found.total == pytest.approx(float((spectrum / (1 + spectrum)).sum()))
    assert found.standard_error == 0.0
    assert other.dimension().total == pytest.approx(found.total, rel=0.2)


ROWS = {
    "ignored labels": lambda: row_case(Categorical(ignore_index=-1), labels(), "mlp"),
    "noise per output": lambda: row_case(
        Gaussian(noise=(0.1, 0.2, 0.5)), values(), "resnet", Isotropic(), budget=2**16
    ),
    "several positions": lambda: row_case(
        Categorical(ignore_index=-1), labels(), "mlp", GPrior(), positions=4
    ),
    "last layer": lambda: row_case(
        Categorical(), labels().clamp_min(0), "transformer", weights="last_layer"
    ),
    "labels": lambda: row_case(Bernoulli(), labels().eq(1), "cnn", Kronecker()),
}
"""Likelihood, prior and network for fewer rows than weights."""


def labels() -> torch.Tensor:
    return torch.arange(6) % 4 - 1


def values() -> torch.Tensor:
    return columns(6, 3, seed=2)


def row_case(
    likelihood, y, kind, prior=None, weights=None, budget=None, positions=1
) -> WeightSystem:
    network, _ = network_of(kind)
    x = inputs_of(kind, len(y) * positions)
    y = torch.stack([y.roll(i) for i in range(positions)], 1).squeeze(1)
    if positions > 1:
        x = x.unflatten(0, (-1, positions))
    elif isinstance(likelihood, Bernoulli):
        y = torch.stack([y, ~y, y.roll(1)], 1).long()
    tangent = Tangent(network, weights=weights, memory_budget=budget)
    stream = stream_of(DataLoader(TensorDataset(x, y), batch_size=4), tangent.device)
    data = TangentData(tangent, stream, likelihood)
    outputs = data.network_outputs
    likelihood = likelihood.with_targets(data.targets, outputs.shape[1])
    data = replace(data, likelihood=likelihood)
    prior = (prior or Layerwise("tensors")).build(
        tangent, lambda count: curvature_probes(data, likelihood, outputs, count, 0)
    )
    return WeightSystem(data, prior, likelihood, outputs)


@pytest.mark.parametrize("kept", [0, 2**20], ids=["batches", "kept"])
@pytest.mark.parametrize("case", ROWS)
def test_few_rows_are_factorised_as_many_weights_would_be(monkeypatch, case, kept):
    monkeypatch.setattr(curvature, "_KEPT_NUMBERS", kept)
    system = ROWS[case]()
    features = torch.cat(
        [system.features(batch, at) for batch, at in system.data.batches()]
    )
    assert system.is_wide
    precisions = 0.2 + torch.arange(system.prior.num_groups).double()
    prior = system.prior.with_precisions(precisions)
    scales = torch.cat(
        [
            precisions[g].expand(s.stop - s.start)
            for s, g in zip(prior.groups, prior.group_of, strict=True)
        ]
    )
    close = {"rtol": 1e-8, "atol": 1e-8}
    kernels = system.data.kernels(system.prior)
    torch.testing.assert_close(system.row_gram, features @ features.mT, **close)
    for other in (replace(system, prior=prior), replace(system).at(-system.outputs)):
        assert other.data.kernels(other.prior) is kernels
    system = replace(system, prior=prior)
    features = features / scales.sqrt()
    torch.testing.assert_close(system.row_gram, features @ features.mT, **close)
    b = columns(system.num_weights, 2)
    torch.testing.assert_close(system.solve(b), exact(features, b), **close)
    matrix = features.mT @ features
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    shares = (torch.linalg.inv(matrix + eye) @ matrix).diagonal().unsqueeze(1)
    expected = prior.group_sums(shares, torch.ones_like(shares))[:, 0]
    torch.testing.assert_close(system.dimensions(), expected, **close)
    torch.testing.assert_close(system.gram, matrix, **close)


def test_rows_of_several_processes_leave_the_matrix_of_the_weights():
    system = ROWS["last layer"]()
    system.data.stream.processes = Processes(0, 2)
    assert not system.is_wide


@pytest.mark.parametrize("rows", [2**30, 17])
def test_auto_factorises_few_rows(monkeypatch, rows):
    monkeypatch.setattr(curvature, "_MOST_ROWS", rows)
    monkeypatch.setattr(curvature, "_MOST_WEIGHTS", 0)
    system = ROWS["labels"]()
    found = chosen_solver("auto", system.data, system.likelihood)
    assert isinstance(found, WeightCholesky if rows >= 18 else WeightCG)


def test_a_preconditioner_follows_precisions_and_noise_without_a_pass():
    """With all of the rank it is the inverse itself."""
    system, _, _, _ = tiny_system()
    prior = Layerwise().build(system.data.tangent, no_probes)
    system = replace(system, prior=prior, likelihood=Gaussian(noise=0.1))
    generator = torch.Generator().manual_seed(0)
    assert system.preconditioner(system.num_weights, generator).passes == 1.0
    alpha = torch.linspace(2.0, 3.0, system.prior.num_groups).to(system.outputs)
    moved = replace(
        system,
        prior=system.prior.with_precisions(alpha),
        likelihood=system.likelihood.with_noise(0.03),
    )
    inverse = moved.preconditioner(system.num_weights, generator)
    assert inverse.passes == 0.0
    v = columns(system.num_weights, 2)
    found = inverse(moved.precision(v))
    torch.testing.assert_close(found / inverse.magnitude, v, rtol=1e-5, atol=1e-6)


def test_the_step_size_is_safe_for_every_batch():
    system, features, _, _ = tiny_system(batch=23)
    largest = largest_batch_eigenvalue(system, torch.Generator().manual_seed(0))
    truth = float(torch.linalg.matrix_norm(features, 2) ** 2)
    assert 0.9 * truth < largest <= truth * (1 + 1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tolerance": 0.0}, "tolerance"),
        ({"max_passes": -1.0}, "max_passes"),
        ({"momentum": 1.0}, "momentum"),
        ({"step_size": 0.0}, "step_size"),
    ],
)
def test_bad_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightSGD(**arguments)
