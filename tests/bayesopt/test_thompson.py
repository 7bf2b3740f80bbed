"""Thompson sampling: what it finds, what it warm-starts, how it goes on."""

from __future__ import annotations

import functools

import pytest
import torch
from gpytorch.kernels import MaternKernel, ScaleKernel

import sgdgp
from sgdgp.bayesopt import maximise, thompson_sampling
from sgdgp.bayesopt.posteriors import Chain, Options
from sgdgp.bayesopt.record import KIND
from sgdgp.bayesopt.thompson import evaluate
from sgdgp.core.codec import read_values
from sgdgp.core.errors import CheckpointError
from tests.models import GP

BOX = torch.tensor([[-1.0, 0.0], [1.0, 4.0]])
TOP = torch.tensor([0.3, 2.6])
MAXIMISER = functools.partial(maximise, num_candidates=32, rounds=2, steps=6)


def objective(x):
    """A hill of height 3 at ``TOP``."""
    return 3 - (2 * (x - TOP) / torch.tensor([1.0, 2.0])).square().sum(1)


def model(n=4):
    x = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(
        n, 2, generator=torch.Generator().manual_seed(0)
    )
    found = GP(x, objective(x), ScaleKernel(MaternKernel(nu=2.5)))
    found.likelihood.noise = 1e-3
    return found


def sampled(f=objective, initial=10, steps=3, batch=5, **settings):
    settings = {
        "model": model(),
        "maximiser": MAXIMISER,
        "num_features": 128,
        "progress": False,
        **settings,
    }
    return thompson_sampling(f, BOX, initial, steps, batch, **settings)


class Watched:
    """The objective, with a log of what it is asked and failures on request."""

    def __init__(self, failures=()):
        self.asked = []
        self.failures = dict(failures)

    def __call__(self, x):
        self.asked.append(x)
        failure = self.failures.pop(len(self.asked), None)
        if isinstance(failure, BaseException):
            raise failure
        return objective(x) if failure is None else failure(objective(x))


@pytest.mark.parametrize(
    "settings", [{}, {"redraw_every": 1}, {"refit_every": 2}, {"model": None}]
)
def test_the_top_is_found(settings):
    result = sampled(steps=4, batch=8, **settings)
    assert result.best_y > 2.98
    assert result.reason == "finished"
    torch.testing.assert_close(result.y, objective(result.x))
    torch.testing.assert_close(result.best_x, TOP, rtol=0, atol=0.2)


def test_random_points_alone_do_not_find_the_top():
    assert sampled(initial=42, steps=0).best_y < 2.98


def test_history_says_what_every_step_did():
    result = sampled()
    assert [step.step for step in result.history] == [0, 1, 2, 3]
    assert [step.num_observations for step in result.history] == [10, 15, 20, 25]
    best = [float(result.y[:n].max()) for n in (10, 15, 20, 25)]
    assert [step.best_y for step in result.history] == best
    assert all(step.reason == "converged" for step in result.history[1:])
    assert len(result.posterior.problem.x) == 20


def test_data_to_begin_with_come_first_and_are_not_evaluated():
    watched, x = Watched(), model(7).train_inputs[0]
    result = sampled(watched, (x, objective(x)), steps=1)
    assert torch.equal(result.x[:7], x)
    assert [len(points) for points in watched.asked] == [5]


def test_each_proposal_is_the_maximum_of_its_function():
    thorough = functools.partial(maximise, num_candidates=200, rounds=3)
    result = sampled(steps=1, maximiser=thorough)
    values = result.posterior.functions.each(result.x[10:].unsqueeze(1))
    candidates = result.posterior.functions(result.x)
    assert bool((values[:, 0] >= candidates.amax(1) - 1e-4).all())


def test_functions_are_kept_or_drawn_anew_as_asked():
    x = torch.linspace(0, 1, 5).unsqueeze(1) * (BOX[1] - BOX[0]) + BOX[0]
    kept, new = (
        [
            sampled(steps=steps, redraw_every=every).posterior.problem.draws(x)
            for steps in (1, 2, 3)
        ]
        for every in (None, 2)
    )
    assert torch.equal(kept[0], kept[2])
    assert torch.equal(new[0], new[1])
    assert not torch.equal(new[1], new[2])


def test_the_redrawn_posterior_solves_the_system_of_all_data():
    posterior = sampled(steps=3, redraw_every=1).posterior
    problem = posterior.problem
    matrix = problem.operator.cross(problem.operator.x).block(
        slice(0, 20), slice(0, 20)
    ) + torch.diag(problem.noise)
    torch.testing.assert_close(
        matrix @ posterior.solution.weights, problem.rhs, rtol=0, atol=1e-3
    )
    assert problem.rhs.shape == (20, 6)


def test_kept_functions_cost_a_fraction_of_the_passes():
    generator = torch.Generator().manual_seed(0)
    x = BOX[0] + (BOX[1] - BOX[0]) * torch.rand(700, 2, generator=generator)
    noisy = objective(x) + 0.1 * torch.randn(700, generator=generator)
    given = model()
    given.likelihood.noise = 1e-2
    settings = {"model": given, "solver": sgdgp.SDD(tolerance=3e-2), "steps": 2}
    kept, new = (
        sampled(initial=(x, noisy), redraw_every=every, **settings).history
        for every in (None, 1)
    )
    assert kept[0].passes == new[0].passes
    assert kept[1].passes < new[1].passes / 3


def test_the_model_learns_again_when_asked():
    settings = {"steps": 3, "refit_every": 2}
    lengths = [
        float(
            sampled(
                **{**settings, "steps": steps}
            ).posterior.problem.prior.model.kernel.base_kernel.lengthscale
        )
        for steps in (2, 3)
    ]
    assert lengths[0] == pytest.approx(model().kernel.base_kernel.lengthscale.item())
    assert lengths[1] != pytest.approx(lengths[0], rel=1e-2)


def test_the_model_that_is_given_is_left_as_it_is():
    given = model()
    before = {k: v.clone() for k, v in given.state_dict().items()}
    sampled(model=given, refit_every=1, steps=2)
    assert all(torch.equal(before[k], v) for k, v in given.state_dict().items())


def test_a_function_of_the_data_may_make_the_model():
    seen = []

    def maker(x, y):
        seen.append(len(x))
        return model()

    sampled(model=maker, refit_every=2)
    assert seen == [10, 20]


@pytest.mark.parametrize(
    "settings",
    [
        {"redraw_every": 2},
        # CG leaves a preconditioner and directions to the next solve.
        {"solver": sgdgp.CG(tolerance=1e-2)},
    ],
)
def test_more_steps_later_are_the_steps_of_one_run(tmp_path, settings):
    once = sampled(steps=7, checkpoint=tmp_path / "once", **settings)
    for steps in (1, 4, 7):
        result = sampled(steps=steps, checkpoint=tmp_path / "again", **settings)
    assert torch.equal(result.x, once.x)
    assert torch.equal(result.y, once.y)
    passes = [[step.passes for step in run.history] for run in (result, once)]
    assert passes[0] == passes[1]
    # What the last stored solve left is in the file of its posterior.
    found = sgdgp.load(tmp_path / "again.posterior", model())
    assert (found.solution.recycled is not None) == ("solver" in settings)
    assert {path.suffix for path in tmp_path.glob("again*")} == {"", ".posterior"}


def test_refits_and_default_models_go_on_as_well(tmp_path):
    settings = {"model": None, "refit_every": 2}
    once = sampled(steps=4, checkpoint=tmp_path / "once", **settings)
    for steps in (3, 4):
        result = sampled(steps=steps, checkpoint=tmp_path / "again", **settings)
    assert torch.equal(result.x, once.x)


def test_a_finished_run_evaluates_nothing(tmp_path):
    first = sampled(checkpoint=tmp_path / "run")
    watched = Watched()
    again = sampled(watched, checkpoint=tmp_path / "run")
    assert not watched.asked
    assert torch.equal(again.x, first.x)
    assert again.history == first.history


@pytest.mark.parametrize(("every", "known"), [(0, [0, 2, 4, 6, 8]), (1e9, [0] * 5)])
def test_results_are_written_as_often_as_asked(tmp_path, every, known):
    place, seen = tmp_path / "run", []

    def watched(x):
        seen.append(len(read_values(place, KIND)["record"].pending.results))
        return objective(x)

    settings = {"checkpoint": place, "checkpoint_every": every, "evaluate_at_once": 2}
    result = sampled(watched, steps=0, **settings)
    assert seen == known
    assert torch.equal(read_values(place, KIND)["record"].y, result.y)


def test_an_error_leaves_all_results_in_the_file_however_seldom_it_is_written(tmp_path):
    settings = {"evaluate_at_once": 2, "steps": 0}
    settings |= {"checkpoint": tmp_path / "run", "checkpoint_every": 1e9}
    watched = Watched({3: RuntimeError("no")})
    with pytest.raises(RuntimeError, match="no"):
        sampled(watched, **settings)
    sampled(watched, **settings)
    assert torch.equal(watched.asked[3], watched.asked[2])
    assert len(watched.asked) == 6


def test_a_generator_is_a_seed_too():
    drawn = [
        sampled(steps=0, seed=torch.Generator().manual_seed(seed)).x
        for seed in (1, 1, 2)
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), RuntimeError("no")])
def test_after_an_interruption_the_same_proposals_are_evaluated(tmp_path, failure):
    once = sampled(checkpoint=tmp_path / "once", evaluate_at_once=2)
    # Calls 1 to 5 are for the initial points; 7 is in the middle of the first batch.
    watched = Watched({7: failure})
    with pytest.raises(type(failure)):
        sampled(watched, checkpoint=tmp_path / "run", evaluate_at_once=2)
    resumed = sampled(watched, checkpoint=tmp_path / "run", evaluate_at_once=2)
    assert torch.equal(resumed.x, once.x)
    assert torch.equal(watched.asked[6], watched.asked[7])
    asked = torch.cat(watched.asked[:6] + watched.asked[7:])
    assert torch.equal(asked, once.x)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda y: y.masked_fill(y == y[0], torch.nan), "finite values, found nan"),
        (lambda y: y[:-1], "5 values"),
        (lambda y: y.unsqueeze(0), "5 values"),
    ],
)
def test_what_is_no_value_does_not_enter_the_data(tmp_path, wrong, words):
    watched = Watched({2: wrong})
    with pytest.raises(ValueError, match=words):
        sampled(watched, checkpoint=tmp_path / "run")
    result = sampled(watched, checkpoint=tmp_path / "run")
    assert bool(torch.isfinite(result.y).all())
    assert torch.equal(watched.asked[1], watched.asked[2])


def test_a_column_of_values_is_fine():
    result = sampled(lambda x: objective(x).unsqueeze(1).double(), steps=1)
    assert result.y.dtype == torch.float32
    assert result.y.shape == (15,)


def test_the_callback_hears_every_step_and_may_stop(tmp_path):
    heard = []
    result = sampled(
        callback=lambda step: heard.append(step.step) or step.step == 1,
        checkpoint=tmp_path / "run",
    )
    assert heard == [0, 1]
    assert result.reason == "stopped"
    assert sampled(checkpoint=tmp_path / "run").reason == "finished"


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"batch": 4}, "batch"),
        ({"seed": 1}, "seed"),
        ({"initial": 9}, "initial"),
        ({"redraw_every": 1}, "redraw_every"),
        ({"noise": 0.1}, "noise"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, settings, word):
    sampled(steps=0, checkpoint=tmp_path / "run")
    before = (tmp_path / "run").read_bytes()
    with pytest.raises(CheckpointError, match=word):
        sampled(checkpoint=tmp_path / "run", **settings)
    assert (tmp_path / "run").read_bytes() == before


def test_a_posterior_of_other_data_is_refused_and_a_missing_one_replaced(tmp_path):
    for name, seed in (("run", 0), ("other", 1)):
        sampled(steps=1, seed=seed, checkpoint=tmp_path / name)
    (tmp_path / "other.posterior").replace(tmp_path / "run.posterior")
    with pytest.raises(CheckpointError, match="other data"):
        sampled(checkpoint=tmp_path / "run")
    (tmp_path / "run.posterior").unlink()
    with pytest.warns(UserWarning, match="drawn anew"):
        assert len(sampled(checkpoint=tmp_path / "run").y) == 25


def test_a_posterior_that_an_earlier_run_left_is_not_used(tmp_path):
    sampled(steps=1, seed=1, checkpoint=tmp_path / "run")
    (tmp_path / "run").unlink()
    result = sampled(steps=1, checkpoint=tmp_path / "run")
    assert torch.equal(result.x, sampled(steps=1).x)


def test_a_posterior_that_has_all_data_is_not_solved_again(tmp_path):
    result = sampled(steps=1, checkpoint=tmp_path / "run")
    rest = (None, None, None, 128, None, 0, None)
    options = Options(5, model(), "auto", MAXIMISER, *rest)
    chain = Chain(options, tmp_path / "run.posterior")
    found = chain.at(result.x[:10], result.y[:10], result.history[:1])
    x = result.x[:3]
    torch.testing.assert_close(found.mean(x), result.posterior.mean(x))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": -1}, "steps"),
        ({"batch": 0}, "batch"),
        ({"initial": 0}, "initial"),
        ({"initial": (torch.zeros(3, 1), torch.zeros(3))}, "2 columns"),
        ({"initial": (torch.zeros(3, 2), torch.zeros(2))}, r"\(3,\)"),
        ({"initial": (torch.zeros(3, 2).double(), torch.zeros(3))}, "dtype"),
        ({"initial": (torch.zeros(3, 2), torch.full((3,), torch.nan))}, "finite"),
        ({"refit_every": 0}, "refit_every"),
        ({"redraw_every": 0}, "redraw_every"),
        ({"evaluate_at_once": 0}, "evaluate_at_once"),
        ({"seed": 0.5}, "seed"),
        ({"checkpoint_every": -1}, "checkpoint_every"),
        ({"checkpoint_every": "a"}, "checkpoint_every"),
        ({"model": "a"}, "model"),
        ({"maximiser": None}, "maximiser"),
        ({"noise": -1.0}, "noise"),
        ({"callback": 3}, "callback"),
        ({"progress": "yes"}, "progress"),
        ({"seed": 2**64}, "seed"),
        ({"initial": [torch.zeros(3, 2), torch.zeros(3)]}, "initial"),
        ({"solver": "newton"}, "solver"),
        ({"checkpoint": "no/such/directory/run"}, "directory"),
    ],
)
def test_arguments_that_do_not_fit_are_named(settings, words):
    watched = Watched()
    with pytest.raises(Exception, match=words):
        sampled(watched, **settings)
    assert not watched.asked


@pytest.mark.parametrize("found", [None, "high", [1.0, None], [[1.0], [1.0, 2.0]]])
def test_an_objective_that_returns_no_values_is_told_so(found):
    with pytest.raises(ValueError, match=r"^objective: expected 2 values"):
        evaluate(lambda x: found, torch.zeros(2, 1))
