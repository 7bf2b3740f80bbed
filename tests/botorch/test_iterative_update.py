"""Posterior paths of unmodified BoTorch models by sgdgp's solvers."""

from __future__ import annotations

import functools

import pytest
import torch
from botorch.models import (
    ModelListGP,
    MultiTaskGP,
    SingleTaskGP,
    SingleTaskVariationalGP,
)
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling.pathwise import (
    draw_kernel_feature_paths,
    draw_matheron_paths,
    gaussian_update,
    get_matheron_path_model,
)
from botorch.sampling.pathwise.features import KernelEvaluationMap
from gpytorch.kernels import LinearKernel, MaternKernel, RQKernel, ScaleKernel

import sgdgp
from sgdgp.botorch.iterative_update import iterative_update

SAMPLES = 1024


@functools.cache
def data(n: int = 40):
    """Inputs in [0, 4]^3, two outputs with noise, and new points."""
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.rand(n, 3, generator=generator, dtype=torch.float64)
    noise = 0.5 * torch.randn(n, 2, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sin().sum(-1), x.cos().sum(-1)], dim=-1)
    new = 4 * torch.rand(6, 3, generator=generator, dtype=torch.float64)
    return x, 5 * y + 3 + noise, new


def transforms(outputs: int = 1):
    return {
        "input_transform": Normalize(3),
        "outcome_transform": Standardize(outputs),
    }


def plain(n: int = 40, **settings):
    x, y, _ = data(n)
    model = SingleTaskGP(x, y[:, :1], **(transforms() | settings)).eval()
    model.likelihood.noise = 0.1
    return model


def several(**settings):
    x, y, _ = data()
    model = SingleTaskGP(x, y, **(transforms(2) | settings)).eval()
    model.covar_module.lengthscale = torch.tensor([0.4, 1.0]).reshape(2, 1, 1)
    return model


def fixed_noise(outputs: int = 1):
    x, y, _ = data()
    variances = torch.linspace(0.1, 2, y[:, :outputs].numel(), dtype=torch.float64)
    return SingleTaskGP(
        x,
        y[:, :outputs],
        train_Yvar=variances.reshape(-1, outputs),
        **transforms(outputs),
    ).eval()


MODELS = {
    "default": plain,
    "no transforms": lambda: plain(input_transform=None, outcome_transform=None),
    "in training mode": lambda: plain().train(),
    "rational quadratic": lambda: plain(
        covar_module=ScaleKernel(RQKernel(ard_num_dims=3))
    ),
    "sum": lambda: plain(covar_module=MaternKernel(nu=2.5) + LinearKernel()),
    "fixed noise": fixed_noise,
    "two outputs": several,
    "two outputs with fixed noise": lambda: fixed_noise(2),
}


def values_of(paths, x):
    """Values (s, n, m)."""
    with torch.no_grad():
        values = paths(x)
    return values.unsqueeze(-1) if values.ndim == 2 else values.mT


def drawn(model, update, seed=0, samples=SAMPLES):
    torch.manual_seed(seed)
    return draw_matheron_paths(model, torch.Size([samples]), update_strategy=update)


def assert_same_posterior(values, posterior):
    """Moments of samples (s, n, m) are those of a posterior.

    Standard errors are 0.02 for the mean, and 0.03 for the variance beside the error of
    1,024 features that all paths share.
    """
    mean, variance = posterior.mean, posterior.variance
    assert values.shape == (SAMPLES, *mean.shape)
    assert float(((values.mean(0) - mean) / variance.sqrt()).abs().max()) < 0.1
    assert float((values.var(0) / variance).log().abs().max()) < 0.5


@pytest.mark.parametrize("name", MODELS)
def test_paths_have_the_posterior_of_the_model(name):
    model, new = MODELS[name](), data()[2]
    paths = drawn(model, iterative_update())
    model.eval()  # in training mode Normalize would learn bounds from new points
    values, posterior = values_of(paths, new), model.posterior(new)
    assert_same_posterior(values, posterior)


@pytest.mark.parametrize("name", MODELS)
def test_weights_solve_the_equations_of_botorchs_own_update(name, monkeypatch):
    # The same prior functions and noise: then both updates are the same functions.
    model, (_, _, new) = MODELS[name](), data()
    torch.manual_seed(3)
    values = torch.randn(5, *model.train_targets.shape, dtype=torch.float64)
    noise = torch.randn(values.shape, dtype=torch.float64)

    def same_noise(*_, **__):
        return noise

    monkeypatch.setattr(torch, "randn", same_noise)
    monkeypatch.setattr(torch, "randn_like", same_noise)
    ours = iterative_update("cg")(model, sample_values=values)
    theirs = gaussian_update(model, sample_values=values)
    inputs = new if model.num_outputs == 1 else new.unsqueeze(-3)
    with torch.no_grad():
        error = (ours(inputs) - theirs(inputs)).abs().max()
    assert type(ours.feature_map) is KernelEvaluationMap
    assert float(error) < 0.02


def test_a_model_list_draws_noise_of_its_own_for_each_model():
    model = ModelListGP(plain(), plain())
    update = iterative_update()
    paths = drawn(model, update, samples=64)
    first, second = (path.paths["update_paths"] for path in paths.paths)
    assert float((first.weight - second.weight).abs().max()) > 0.1
    assert len(paths(data()[2])) == 2
    again = drawn(model, iterative_update(), samples=64).paths[0].paths["update_paths"]
    assert torch.equal(first.weight, again.weight)
    other = drawn(model, iterative_update(seed=1), samples=64).paths[0]
    assert not torch.allclose(first.weight, other.paths["update_paths"].weight)


@pytest.mark.parametrize("solver", ["auto", "cg", sgdgp.SDD(tolerance=1e-2)])
def test_solvers_report_one_solution_for_each_output(solver):
    update = iterative_update(solver)
    drawn(several(), update, samples=4)
    assert len(update.solutions) == 2
    for solution in update.solutions:
        assert solution.reason == "converged"
        assert solution.weights.shape == (40, 4)


def test_no_square_matrix_is_built_within_a_small_budget(monkeypatch):
    n = 400
    model = plain(n)
    solver = sgdgp.CG(preconditioner=None, tolerance=1e-2)
    update = iterative_update(solver, memory_budget=n * n)  # an eighth of K
    monkeypatch.setattr(torch.linalg, "cholesky_ex", None)
    drawn(model, update, samples=4)
    assert update.solutions[0].operator == "tiled"


def test_a_solve_that_ends_early_is_said_to_have():
    update = iterative_update(sgdgp.CG(max_passes=1.5, preconditioner=None))
    with pytest.warns(UserWarning, match="relative residual"):
        drawn(plain(), update, samples=4)


def tasks(values=(0.0, 1.0), **settings):
    """A model of two tasks that differ in mean, noise and function."""
    x, y, _ = data()
    torch.manual_seed(0)  # a model's task covariance is random to begin with
    column = [torch.full((40, 1), value, dtype=torch.float64) for value in values]
    rows = torch.cat([torch.cat([x, c], dim=1) for c in column])
    model = MultiTaskGP(
        rows,
        y.T.reshape(-1, 1),
        task_feature=-1,
        input_transform=Normalize(4, indices=[0, 1, 2]),
        **settings,
    ).eval()
    model.likelihood.noise = torch.tensor([0.01, 0.1])
    for mean, constant in zip(model.mean_module.base_means, (-0.5, 0.5), strict=True):
        mean.constant.data.fill_(constant)
    return model


@pytest.mark.parametrize("update", [gaussian_update, iterative_update()])
def test_multitask_models_draw_paths_of_points_and_tasks(update):
    # BoTorch's posterior finds no noise for tasks that are not numbered 0, 1, ...;
    # its mean and variance with those numbers are the truth for any others.
    new = data()[2]
    truth = tasks().posterior(new)
    for values in ((0.0, 1.0), (2.0, 5.0)):
        paths = drawn(tasks(values), update)
        found = [
            values_of(paths, torch.cat([new, torch.full((6, 1), task)], dim=1))
            for task in values
        ]
        assert_same_posterior(torch.cat(found, dim=-1), truth)


def test_a_multitask_model_of_one_output_needs_no_task_column():
    model, new = tasks(output_tasks=[1]), data()[2]
    values = values_of(drawn(model, iterative_update()), new)
    assert_same_posterior(values, model.posterior(new))
    single = get_matheron_path_model(model)
    assert single(new.requires_grad_()).shape == (6, 1)


def test_multitask_prior_functions_have_the_mean_of_their_task():
    model = tasks()
    torch.manual_seed(0)
    paths = draw_kernel_feature_paths(model, sample_shape=torch.Size([SAMPLES]))
    scale, shift = model.outcome_transform.stdvs, model.outcome_transform.means
    for task, constant in enumerate((-0.5, 0.5)):
        new = data()[2]
        values = values_of(paths, torch.cat([new, torch.full((6, 1), task)], dim=1))
        error = values.mean(0) - (constant * scale + shift)
        assert float((error / scale).abs().max()) < 0.1


def test_a_multitask_path_without_its_task_is_refused():
    with pytest.raises(ValueError, match="task in column 3"):
        drawn(tasks(), iterative_update(), samples=2)(data()[2])


def test_sparse_models_are_refused():
    x, y, _ = data()
    model = SingleTaskVariationalGP(x, y[:, :1])
    with pytest.raises(TypeError, match="gaussian_update"):
        drawn(model, iterative_update())


def test_bad_noise_is_refused():
    model = fixed_noise()
    model.likelihood.noise_covar.noise[3] = float("nan")
    with pytest.raises(ValueError, match="likelihood noise: expected positive finite"):
        drawn(model, iterative_update(), samples=2)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"solver": "quantum"}, ValueError),
        ({"seed": 0.5}, TypeError),
        ({"memory_budget": 0}, ValueError),
        ({"memory_budget": 1e6}, TypeError),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(settings, error):
    with pytest.raises(error, match=next(iter(settings))):
        iterative_update(**settings)
