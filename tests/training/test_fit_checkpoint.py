import os
import shutil
import signal
import threading

import gpytorch
import pytest
import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel, RBFKernel

import sgdgp
from sgdgp.core.errors import CheckpointError
from sgdgp.core.files import read_file, write_file
from sgdgp.training import PathwiseProbes, Plateau, StandardProbes, fit
from sgdgp.training.fit_checkpoint import KIND
from tests.training.problems import Model, assert_same, data, parameters, rbf_model

CG = sgdgp.CG(tolerance=1e-3, preconditioner=None)
KINDS = {
    "exact": {},
    "pathwise": {"probes": PathwiseProbes(8, num_features=64), "solver": CG},
    "standard": {"probes": StandardProbes(8), "solver": CG},
    "sdd": {"probes": StandardProbes(4), "solver": "sdd"},
}
STEPS = 8


def stop_after(count):
    return lambda entry: entry.step + 1 == count


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_a_fit_that_was_stopped_goes_on_as_if_it_had_not(settings, tmp_path):
    path = tmp_path / "fit.sgdgp"
    whole, model = rbf_model(), rbf_model()
    truth = fit(whole, steps=STEPS, **settings)
    for stop in (3, 5):
        model = rbf_model()  # as in a new process
        stopped = fit(
            model,
            steps=STEPS,
            checkpoint=path,
            callback=stop_after(stop),
            **settings,
        )
        assert (stopped.reason, stopped.steps) == ("interrupted", stop)
    model = rbf_model()
    fitted = fit(model, steps=STEPS, checkpoint=path, **settings)
    assert_same(parameters(model), parameters(whole), rtol=1e-6, atol=1e-8)
    assert fitted.steps == truth.steps == STEPS
    assert fitted.passes == pytest.approx(truth.passes)
    for found, wanted in zip(fitted.history, truth.history, strict=True):
        assert found.step == wanted.step
        assert found.value == pytest.approx(wanted.value, rel=1e-6, abs=1e-8)
        assert found.parameters.keys() == wanted.parameters.keys()
    seconds = [entry.seconds for entry in fitted.history]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
def test_what_a_killed_fit_had_written_is_gone_on_from(settings, tmp_path):
    path, kept = tmp_path / "fit.sgdgp", tmp_path / "kept.sgdgp"

    def callback(entry):
        if entry.step == 4:  # what is on the disk if the process dies here
            shutil.copy(path, kept)

    whole, again = rbf_model(), rbf_model()
    fit(
        whole,
        steps=STEPS,
        checkpoint=path,
        checkpoint_every=1e-9,
        callback=callback,
        **settings,
    )
    seen = []
    fit(again, steps=STEPS, checkpoint=kept, callback=seen.append, **settings)
    assert [entry.step for entry in seen] == list(range(5, STEPS))
    assert_same(parameters(again), parameters(whole), rtol=1e-6, atol=1e-8)


def test_a_new_preconditioner_changes_no_more_than_the_accuracy_of_a_solve(tmp_path):
    settings = {"probes": StandardProbes(8), "solver": "cg", "steps": STEPS}
    whole, model = rbf_model(300), rbf_model(300)
    fit(whole, **settings)
    path = tmp_path / "fit.sgdgp"
    fit(rbf_model(300), checkpoint=path, callback=stop_after(4), **settings)
    fit(model, checkpoint=path, **settings)
    assert_same(parameters(model), parameters(whole), rtol=0.02, atol=0.02)


class Fatal(Exception):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, Fatal])
def test_what_ends_a_callback_leaves_the_steps_made_in_the_file(error, tmp_path):
    path = tmp_path / "fit.sgdgp"

    def callback(entry):
        if entry.step == 2:
            raise error

    model = rbf_model()
    model.eval()
    with pytest.raises(error):
        fit(model, steps=STEPS, checkpoint=path, callback=callback)
    assert not model.training
    assert path.exists()
    whole, again = rbf_model(), rbf_model()
    fit(whole, steps=STEPS)
    seen = []
    fitted = fit(again, steps=STEPS, checkpoint=path, callback=seen.append)
    assert [entry.step for entry in seen] == list(range(3, STEPS))
    assert fitted.steps == STEPS
    assert_same(parameters(again), parameters(whole), rtol=1e-6, atol=1e-8)


def test_control_c_at_any_moment_leaves_a_file_to_go_on_from(tmp_path):
    path = tmp_path / "fit.sgdgp"
    timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))

    def callback(entry):
        if entry.step == 3:
            timer.start()

    # Processes in the background may have been started to ignore it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            fit(
                rbf_model(),
                steps=10**6,
                plateau=None,
                checkpoint=path,
                callback=callback,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    model = rbf_model()
    fitted = fit(
        model, steps=10**6, plateau=None, checkpoint=path, callback=lambda entry: True
    )
    assert fitted.reason == "interrupted"
    assert fitted.steps >= 5
    assert [entry.step for entry in fitted.history] == list(range(fitted.steps))
    values = [entry.value for entry in fitted.history]
    assert values[0] < values[-2] <= values[-1] + 1e-3


def test_the_file_is_written_while_the_fit_runs(tmp_path):
    path = tmp_path / "fit.sgdgp"
    seen = []
    fit(
        rbf_model(),
        steps=4,
        checkpoint=path,
        checkpoint_every=1e-9,
        callback=lambda entry: seen.append(path.exists()),
    )
    assert all(seen)
    assert list(tmp_path.iterdir()) == [path]


def test_an_ended_fit_is_returned_at_once_and_goes_on_with_more_steps(tmp_path):
    path = tmp_path / "fit.sgdgp"
    first, again, more, whole = (rbf_model() for _ in range(4))
    before = fit(first, steps=4, checkpoint=path)
    seen = []
    after = fit(again, steps=4, checkpoint=path, callback=seen.append)
    assert seen == []
    assert after.history == before.history
    assert after.reason == before.reason == "steps"
    assert_same(parameters(again), parameters(first), rtol=0.0, atol=0.0)
    assert fit(more, steps=STEPS, checkpoint=path).steps == STEPS
    fit(whole, steps=STEPS)
    assert_same(parameters(more), parameters(whole), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", ["gpytorch", "botorch"])
@pytest.mark.parametrize("steps", [6, 14, 18])
def test_a_fit_that_had_fallen_goes_on_as_if_it_had_not_ended(tmp_path, kind, steps):
    def made():
        x, y = data(40, 2)
        return rbf_model() if kind == "gpytorch" else SingleTaskGP(x, y[:, None])

    def far(moved):
        return torch.optim.Adam(moved, lr=1.0)

    path = tmp_path / "fit.sgdgp"
    part, again, whole = (made() for _ in range(3))
    ended = fit(part, steps=steps, optimizer=far, checkpoint=path)
    assert fit(again, steps=steps, optimizer=far, checkpoint=path).steps == ended.steps
    assert_same(parameters(again), parameters(part), rtol=0.0, atol=0.0)
    fit(again, steps=40, optimizer=far, checkpoint=path)
    fit(whole, steps=40, optimizer=far)
    assert_same(parameters(again), parameters(whole), rtol=1e-9, atol=1e-12)


def test_a_fit_whose_time_was_up_stays_ended(tmp_path):
    settings = {"steps": 10_000, "plateau": None, "checkpoint": tmp_path / "fit.sgdgp"}
    first, again = rbf_model(), rbf_model()
    before = fit(first, max_seconds=0.5, **settings)
    after = fit(again, max_seconds=0.5, **settings)
    assert (after.reason, after.history) == ("budget", before.history)
    assert_same(parameters(again), parameters(first), rtol=0.0, atol=0.0)


def test_a_plateau_is_asked_anew_with_the_callers_patience(tmp_path):
    path = tmp_path / "fit.sgdgp"
    eager = Plateau(patience=2, gain=10.0)
    first = fit(rbf_model(), steps=20, plateau=eager, checkpoint=path)
    assert (first.reason, first.steps) == ("plateau", 3)
    again = fit(rbf_model(), steps=20, plateau=eager, checkpoint=path)
    assert (again.reason, again.steps) == ("plateau", 3)
    patient = fit(rbf_model(), steps=20, plateau=None, checkpoint=path)
    assert (patient.reason, patient.steps) == ("steps", 20)


class Burst(torch.optim.SGD):
    """Its first step leads to NaN."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.fill_(float("nan"))


def test_a_fit_goes_back_to_where_it_was_sound_also_after_a_restart(tmp_path):
    path = tmp_path / "fit.sgdgp"
    fit(
        rbf_model(),
        steps=5,
        checkpoint=path,
        optimizer=lambda p: Burst(p, lr=0.1),
        callback=lambda entry: True,
    )
    model = rbf_model()
    fitted = fit(model, steps=5, checkpoint=path, optimizer=lambda p: Burst(p, lr=0.1))
    assert fitted.reason == "diverged"
    assert_same(parameters(model), parameters(rbf_model()), rtol=0.0, atol=0.0)


class Slip(torch.optim.SGD):
    """One of its steps, if it gets there, leads to NaN."""

    left = 2

    def step(self, closure=None):
        super().step(closure)
        self.left -= 1
        if self.left == 0:
            self.param_groups[0]["params"][0].data.fill_(float("nan"))


def sound(learned):
    optimiser = Slip(learned, lr=0.1)
    optimiser.left = -1
    return optimiser


def test_a_learning_rate_that_was_halved_stays_so_after_a_restart(tmp_path):
    path = tmp_path / "fit.sgdgp"
    whole, model = rbf_model(), rbf_model()
    slip = {"optimizer": lambda p: Slip(p, lr=0.1)}
    fit(whole, steps=STEPS, **slip)
    fit(rbf_model(), steps=STEPS, checkpoint=path, callback=stop_after(4), **slip)
    fitted = fit(model, steps=STEPS, checkpoint=path, optimizer=sound)
    assert "number of times: 1" in fitted.warnings[0]
    assert_same(parameters(model), parameters(whole), rtol=1e-6, atol=1e-8)


def written(path):
    fit(rbf_model(), steps=2, checkpoint=path)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"y": data(60, 2, seed=1)[1]}, "training targets"),
        ({"x": data(60, 2, seed=1)[0]}, "training inputs"),
        ({"seed": 1}, "settings of the fit"),
        ({"passes_per_step": 3.0}, "settings of the fit"),
        ({"probes": StandardProbes(3)}, "settings of the fit"),
        ({"optimizer": lambda p: torch.optim.SGD(p, lr=0.1)}, "optimizer"),
    ],
    ids=["y", "x", "seed", "passes", "probes", "optimizer"],
)
def test_another_fits_file_is_refused_with_what_differs(changed, words, tmp_path):
    path = tmp_path / "fit.sgdgp"
    written(path)
    x, y = data(60, 2)
    with pytest.raises(CheckpointError, match=f"another fit.*{words}"):
        fit(rbf_model(), **{"x": x, "y": y, "checkpoint": path, **changed})


def test_a_file_that_spells_it_optimiser_is_still_of_this_fit(tmp_path):
    path = tmp_path / "fit.sgdgp"
    written(path)
    tensors, state = read_file(path, KIND)
    names = state["components"]["dict"]
    names["optimiser"] = names.pop("optimizer")
    write_file(path, KIND, tensors, state)
    x, y = data(60, 2)
    assert fit(rbf_model(), x, y, steps=1, checkpoint=path).history


def test_a_file_that_is_refused_leaves_the_model_as_it_is(tmp_path):
    path = tmp_path / "fit.sgdgp"
    written(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    model = rbf_model()
    with pytest.raises(CheckpointError, match="damaged"):
        fit(model, steps=2, checkpoint=path)
    assert_same(parameters(model), parameters(rbf_model()), rtol=0.0, atol=0.0)


def test_another_models_file_is_refused(tmp_path):
    path = tmp_path / "fit.sgdgp"
    written(path)
    model = rbf_model()
    model.covar_module.base_kernel = MaternKernel(nu=1.5).double()
    with pytest.raises(CheckpointError, match=r"another fit.*base_kernel"):
        fit(model, checkpoint=path)
    model = rbf_model()
    model.likelihood.raw_noise.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"another fit.*noise"):
        fit(model, checkpoint=path)


def test_a_fit_that_fails_at_once_leaves_no_file(tmp_path):
    likelihood = gpytorch.likelihoods.GaussianLikelihood(
        noise_constraint=gpytorch.constraints.Positive()
    )
    likelihood.raw_noise.data.fill_(-1e4)
    x, y = data(60, 2)
    x[1:] = x[0]
    model = Model(x, y, RBFKernel(), likelihood)
    with pytest.raises(torch.linalg.LinAlgError, match="not positive definite"):
        fit(model, x, y, checkpoint=tmp_path / "fit.sgdgp")
    assert list(tmp_path.iterdir()) == []
