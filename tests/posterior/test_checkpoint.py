"""Checkpoints: resuming, returning what is done, refusing what does not belong."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from dataclasses import dataclass, field

import pytest
import torch
from gpytorch.kernels import MaternKernel, RBFKernel
from gpytorch.likelihoods import FixedNoiseGaussianLikelihood

import sgdgp
from sgdgp.core import checkpoint as checkpoint_module
from sgdgp.core.codec import read_values
from sgdgp.core.errors import CheckpointError
from sgdgp.core.files import read_file, write_file
from sgdgp.core.hashes import former_structure_of
from sgdgp.posterior import checkpoint as module
from sgdgp.posterior.checkpoint import KIND
from sgdgp.solvers import cholesky
from tests.models import GP, gp, toy_data

SOLVERS = {
    "sdd": sgdgp.SDD(tolerance=1e-2),
    "cg": sgdgp.CG(tolerance=1e-6, preconditioner=None),
}


@dataclass(frozen=True)
class Recording(sgdgp.CG):
    """CG that notes how it is called."""

    calls: list = field(default_factory=list, repr=False, compare=False)

    def solve(self, operator, noise, rhs, **kwargs):
        state = kwargs["generator"].get_state()
        self.calls.append({**kwargs, "rhs": rhs, "solver": self, "state": state})
        return super().solve(operator, noise, rhs, **kwargs)


def model(**changes):
    return gp(MaternKernel(nu=1.5), n=200, noise=1e-2, **changes)


def condition(path, given=None, **changes):
    settings = {"solver": SOLVERS["cg"], "num_samples": 3, "num_features": 256}
    return sgdgp.condition(
        given or model(),
        checkpoint=path,
        checkpoint_every=1e-9,
        **{**settings, **changes},
    )


def stopping_after(passes):
    return lambda progress: progress.passes >= passes


def must_not_run(progress):
    raise AssertionError("the solver ran")


def same(first, second):
    """All that a file holds of two solutions agrees, but for JSON's own types."""
    for item in dataclasses.fields(first):
        if item.name in ("recycled", "factor"):  # of memory only
            continue
        a, b = getattr(first, item.name), getattr(second, item.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), item.name
        elif item.name == "settings":
            assert json.loads(json.dumps(dict(a), default=str)) == dict(b)
        else:
            assert a == b, item.name


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.safetensors"


@pytest.fixture
def stopped(path):
    """A file of a run that was stopped after eight passes."""
    condition(path, callback=stopping_after(8))
    return path


@pytest.mark.parametrize("solver", [*SOLVERS, "cholesky"])
def test_a_finished_solve_is_returned_without_solving(path, solver):
    solver = SOLVERS.get(solver, solver)
    first = condition(path, solver=solver)
    again = condition(path, solver=solver, callback=must_not_run)
    same(first.solution, again.solution)
    x = toy_data(8, seed=1)[0]
    assert torch.equal(first.samples(x), again.samples(x))


def test_a_checkpoint_does_not_change_the_answer(path):
    solution = condition(path).solution
    assert torch.equal(solution.weights, condition(None).solution.weights)


def test_the_old_name_of_the_interval_is_taken_with_a_warning(path):
    with pytest.warns(DeprecationWarning, match="every is now called checkpoint_every"):
        sgdgp.condition(model(), num_samples=0, checkpoint=path, every=10)
    assert path.exists()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_stopped_run_goes_on_and_ends_at_the_same_answer(path, solver):
    settings = {"solver": SOLVERS[solver]}
    undisturbed = condition(None, **settings)
    first = condition(path, **settings, callback=stopping_after(10)).solution
    assert first.reason == "interrupted"
    second = condition(path, **settings).solution
    assert second.reason == "converged"
    x = toy_data(8, seed=1)[0]
    gap = condition(path, **settings).samples(x) - undisturbed.samples(x)
    # Two solutions, each within its tolerance of the truth.
    assert gap.norm() <= 2 * SOLVERS[solver].tolerance * undisturbed.samples(x).norm()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_ends_a_solve_between_two_writes_loses_nothing(path, error):
    def interrupt(progress):
        if progress.passes >= 8:
            raise error

    settings = {"num_samples": 3, "num_features": 256, "solver": SOLVERS["cg"]}
    settings |= {"checkpoint": path, "checkpoint_every": 60}
    with pytest.raises(error):
        sgdgp.condition(model(), **settings, callback=interrupt)
    kept = read_values(path, KIND)["solution"]
    assert kept.reason == "interrupted"
    assert kept.passes >= 8
    assert float(kept.residuals.max()) < 1
    after = sgdgp.condition(model(), **settings).solution
    assert after.history[: len(kept.history)] == kept.history


def test_passes_seconds_and_history_are_of_all_runs(stopped):
    before = read_values(stopped, KIND)["solution"]
    seen = []
    after = condition(stopped, callback=lambda p: seen.append(p.passes)).solution
    assert seen[0] > before.passes >= 8
    assert after.seconds > before.seconds > 0
    assert after.history[: len(before.history)] == before.history
    passes = [entry.passes for entry in after.history]
    assert passes == sorted(passes)
    assert passes[-1] == after.passes


def test_the_solver_gets_the_stored_weights_and_an_undisturbed_generator(path):
    solver = Recording(tolerance=1e-6)
    condition(path, solver=solver, callback=stopping_after(4))
    passes = read_values(path, KIND)["solution"].passes
    condition(path, solver=solver)
    first, second = solver.calls
    assert first["initial"] is None
    assert passes >= 4
    assert second["solver"].max_passes == 1000 - passes
    assert torch.equal(first["state"], second["state"])
    assert torch.equal(first["rhs"], second["rhs"])
    assert bool((second["initial"].norm(dim=0) > 0).all())


def test_a_spent_budget_is_returned_and_a_larger_one_goes_on(path):
    small = sgdgp.CG(tolerance=1e-6, preconditioner=None, max_passes=10.0)
    first = condition(path, solver=small).solution
    assert first.reason == "budget"
    same(first, condition(path, solver=small, callback=must_not_run).solution)
    large = dataclasses.replace(small, max_passes=14.0)
    second = condition(path, solver=large).solution
    assert second.reason == "budget"
    assert 11 <= second.passes <= 16
    assert condition(path).solution.reason == "converged"


def test_a_tighter_tolerance_goes_on_and_a_looser_one_is_met(path):
    loose = dataclasses.replace(SOLVERS["cg"], tolerance=1e-2)
    first = condition(path, solver=loose).solution
    second = condition(path).solution
    assert second.passes > first.passes
    assert float(second.residuals.max()) <= 1e-6
    same(second, condition(path, solver=loose, callback=must_not_run).solution)


def test_a_budget_that_is_used_up_is_not_called_converged(path):
    loose = sgdgp.CG(tolerance=1e-1, preconditioner=None, max_passes=40.0)
    assert condition(path, solver=loose).solution.reason == "converged"
    tight = sgdgp.CG(tolerance=1e-9, preconditioner=None, max_passes=2.0)
    assert condition(path, solver=tight).solution.reason == "budget"


def test_another_solver_and_operator_go_on_from_the_same_file(stopped):
    solution = condition(stopped, solver=SOLVERS["sdd"], operator="tiled").solution
    assert (solution.solver, solution.operator) == ("sdd", "tiled")
    assert solution.passes > 8
    assert solution.reason == "converged"


def changed_kernel():
    changed = model()
    changed.kernel.lengthscale = 0.9
    return changed


def changed_mean():
    changed = model()
    changed.mean_module.constant = 0.3
    return changed


def on(x, y):
    given = GP(x, y, MaternKernel(nu=1.5)).to(x.dtype)
    given.likelihood.noise = 1e-2
    given.mean_module.constant = 0.2
    return given


def one_point_moved():
    x, y = toy_data(200)
    x[17, 1] += 1e-9
    return on(x, y)


def one_target_changed():
    x, y = toy_data(200)
    y[3] += 1e-9
    return on(x, y)


OTHERS = {
    "x": (one_point_moved, {}, "training inputs x"),
    "y": (one_target_changed, {}, "training targets y"),
    "kernel": (changed_kernel, {}, "parameter kernel.raw_lengthscale"),
    "mean": (changed_mean, {}, "parameter mean_module.raw_constant"),
    "noise": (
        lambda: gp(MaternKernel(nu=1.5), n=200, noise=2e-2),
        {},
        "parameter likelihood.noise_covar.raw_noise",
    ),
    "nu": (
        lambda: gp(MaternKernel(nu=2.5), n=200, noise=1e-2),
        {},
        "structure of kernel",
    ),
    "class": (lambda: gp(RBFKernel(), n=200, noise=1e-2), {}, "structure of kernel"),
    "seed": (model, {"seed": 1}, "the seed"),
    "samples": (model, {"num_samples": 4}, "num_samples"),
    "features": (model, {"num_features": 128}, "num_features"),
    "dtype": (lambda: model(dtype=torch.float32), {}, "dtype"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_file_of_another_problem_is_refused_by_name(stopped, what):
    build, settings, named = OTHERS[what]
    content = stopped.read_bytes()
    with pytest.raises(CheckpointError, match="another problem") as caught:
        condition(stopped, build(), callback=must_not_run, **settings)
    assert named in str(caught.value)
    assert str(stopped) in str(caught.value)
    assert stopped.read_bytes() == content


def test_fixed_noise_is_part_of_the_problem(path):
    def given(last):
        noise = torch.full((200,), 1e-2, dtype=torch.float64)
        noise[-1] = last
        likelihood = FixedNoiseGaussianLikelihood(noise)
        return gp(MaternKernel(nu=1.5), n=200, likelihood=likelihood)

    condition(path, given(1e-2))
    with pytest.raises(CheckpointError, match="noise variances"):
        condition(path, given(1.001e-2), callback=must_not_run)
    condition(path, given(1e-2), callback=must_not_run)


def test_code_is_part_of_the_problem_by_what_it_computes(path):
    def given(factor):
        return model(covariance=lambda gp, x: gp.kernel(factor * x))

    condition(path, given(2.0))
    condition(path, given(2.0), callback=must_not_run)
    with pytest.raises(CheckpointError, match="values of the kernel"):
        condition(path, given(2.2), callback=must_not_run)


def test_a_generator_is_part_of_the_problem_by_its_state(path):
    stream = torch.Generator().manual_seed(0)
    condition(path, seed=stream)
    condition(path, seed=0, callback=must_not_run)
    with pytest.raises(CheckpointError, match="state of the generator"):
        condition(path, seed=stream)


def test_prior_draws_that_come_out_otherwise_are_refused(stopped, monkeypatch):
    # As another version of torch would make them: same seed, other numbers.
    actual, given = torch.randn, model()
    monkeypatch.setattr(torch, "randn", lambda *a, **k: -actual(*a, **k))
    with pytest.raises(CheckpointError, match="prior draws"):
        condition(stopped, given, callback=must_not_run)


def change_weights(change):
    def changed(tensors, state):
        tensors["solution.weights"] = change(tensors["solution.weights"]).contiguous()

    return changed


CHANGES = {
    "rows": (change_weights(lambda w: w[:-1]), "shape"),
    "columns": (change_weights(lambda w: w[:, 1:]), "shape"),
    "dtype": (change_weights(lambda w: w.float()), "float32"),
    "nan": (change_weights(lambda w: w.fill_(torch.nan)), "NaN"),
    "residual": (lambda t, s: t["solution.residuals"].fill_(torch.inf), "NaN"),
    "missing": (lambda t, s: t.pop("solution.history.clock"), "history.clock"),
    "reason": (
        lambda t, s: s["solution"]["arguments"].update(reason="?"),
        r"unknown reason '\?'",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_content_that_cannot_be_is_refused(stopped, what):
    change, message = CHANGES[what]
    tensors, state = read_file(stopped, KIND)
    change(tensors, state)
    write_file(stopped, KIND, tensors, state)
    with pytest.raises(CheckpointError, match=message):
        condition(stopped, callback=must_not_run)


def test_a_place_that_cannot_be_written_is_refused_before_any_work(tmp_path):
    # A model that fails as soon as it is read: nothing may come before the refusal.
    with pytest.raises(CheckpointError, match="expected an existing directory"):
        condition(tmp_path / "missing" / "run", given="no model")


@pytest.mark.parametrize("every", [0, -1.0, float("nan"), float("inf")])
def test_every_must_be_positive(path, every):
    with pytest.raises(ValueError, match=r"checkpoint_every: expected a positive"):
        sgdgp.condition(model(), checkpoint=path, checkpoint_every=every)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint": 3}, "checkpoint: expected a path"),
        ({"checkpoint": True}, "checkpoint: expected a path"),
        ({"checkpoint": "a", "checkpoint_every": "60"}, "every: expected seconds"),
        ({"checkpoint": "a", "checkpoint_every": None}, "every: expected seconds"),
    ],
)
def test_arguments_of_another_kind_are_refused(settings, message):
    with pytest.raises(TypeError, match=message):
        sgdgp.condition(model(), **settings)


def counted_writes(monkeypatch):
    written = []
    actual = checkpoint_module.write_values

    def write(path, kind, values):
        written.append(values["solution"])
        actual(path, kind, values)

    monkeypatch.setattr(checkpoint_module, "write_values", write)
    return written


def test_writes_are_at_least_every_seconds_apart(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now[0])
    written = counted_writes(monkeypatch)

    def second(progress):
        now[0] += 1.0

    solution = sgdgp.condition(
        model(),
        solver=SOLVERS["cg"],
        num_samples=1,
        checkpoint=path,
        checkpoint_every=10.0,
        callback=second,
    ).solution
    # The last one is the end's.
    assert 2 <= len(written) - 1 <= len(solution.history) / 10


def test_residuals_in_the_file_never_grow(path, monkeypatch):
    written = counted_writes(monkeypatch)
    condition(path)
    assert len(written) > 5
    # CG's own residuals do grow on this problem.
    grew = [
        any(b > a for a, b in zip(first.residuals, second.residuals, strict=True))
        for first, second in itertools.pairwise(written)
    ]
    history = written[-1].history
    rose = [max(b.residuals) > max(a.residuals) for a, b in itertools.pairwise(history)]
    assert any(rose)
    assert not any(grew[:-1])


def test_cholesky_leaves_better_weights_alone_until_it_is_done(stopped, monkeypatch):
    before = read_values(stopped, KIND)["solution"]
    small_blocks = functools.partial(cholesky.factorise_, block=8)
    monkeypatch.setattr(cholesky, "factorise_", small_blocks)
    calls = []

    def stop_at_second(progress):
        calls.append(progress.residuals)
        return len(calls) == 2

    solution = condition(stopped, solver="cholesky", callback=stop_at_second).solution
    assert solution.reason == "interrupted"
    # There were zero weights to be had, with residual one; they were not taken.
    assert torch.equal(calls[0], torch.ones(4, dtype=torch.float64))
    assert torch.equal(read_values(stopped, KIND)["solution"].weights, before.weights)
    assert condition(stopped, solver="cholesky").solution.reason == "converged"


def test_a_write_that_failed_once_is_no_longer_worth_a_warning(path, monkeypatch):
    actual, calls = checkpoint_module.write_values, []

    def failing_once(path, kind, values):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        actual(path, kind, values)

    monkeypatch.setattr(checkpoint_module, "write_values", failing_once)
    assert condition(path).solution.warnings == ()
    assert read_values(path, KIND)["solution"].reason == "converged"


def test_a_file_of_version_0_1_0_may_name_modules_of_classes(path, monkeypatch):
    """Its hashes had them; where sgdgp's own classes stand now does not matter."""
    monkeypatch.setattr(module, "structure_of", former_structure_of)
    condition(path, callback=stopping_after(8))
    monkeypatch.undo()
    assert condition(path).solution.passes > 8


def test_where_a_class_is_defined_is_not_part_of_the_problem(stopped):
    class Moved(MaternKernel):
        pass

    Moved.__qualname__ = "MaternKernel"
    moved = gp(Moved(nu=1.5), n=200, noise=1e-2)
    assert condition(stopped, moved).solution.reason == "converged"


def test_the_old_name_of_an_argument_is_taken_with_a_warning(path):
    with pytest.warns(DeprecationWarning, match="every is now called checkpoint_every"):
        sgdgp.condition(model(), num_samples=0, checkpoint=path, every=5)
