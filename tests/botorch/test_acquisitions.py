"""BoTorch's acquisition functions run with a PathwiseModel, and mean what they say."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from botorch.acquisition import (
    LogExpectedImprovement,
    PosteriorMean,
    UpperConfidenceBound,
    qKnowledgeGradient,
    qLogExpectedImprovement,
    qLogNoisyExpectedImprovement,
    qSimpleRegret,
    qUpperConfidenceBound,
)
from botorch.acquisition.joint_entropy_search import qJointEntropySearch
from botorch.acquisition.max_value_entropy_search import (
    qLowerBoundMaxValueEntropy,
    qMaxValueEntropy,
)
from botorch.acquisition.multi_objective import (
    logei,
    qLogNoisyExpectedHypervolumeImprovement,
)
from botorch.acquisition.thompson_sampling import PathwiseThompsonSampling
from botorch.cross_validation import efficient_loo_cv
from botorch.exceptions.errors import UnsupportedError
from botorch.exceptions.warnings import BotorchWarning
from botorch.generation import MaxPosteriorSampling
from botorch.models import ModelListGP, SingleTaskGP
from botorch.models.model import ModelList
from botorch.models.transforms import Normalize, Standardize
from botorch.optim import optimize_acqf
from botorch.sampling.normal import SobolQMCNormalSampler
from botorch.test_functions import Branin, BraninCurrin, Hartmann
from botorch.utils.sampling import draw_sobol_samples, optimize_posterior_samples
from gpytorch.mlls import ExactMarginalLogLikelihood

from sgdgp.botorch import PathSampler, PathwiseModel

PROBLEMS = {
    "hartmann": lambda: Hartmann(dim=6, negate=True).double(),
    "branin": lambda: Branin(negate=True).double(),
}
DRAWS = 32


@functools.cache
def observed(name):
    """A function, its bounds, and 20 observations of it."""
    function = PROBLEMS[name]()
    x = draw_sobol_samples(function.bounds, n=20, q=1, seed=0).squeeze(1)
    return function.bounds, x, function(x).unsqueeze(-1)


@functools.cache
def definition(name):
    """A model in which new points still matter, and whose paths need few features."""
    bounds, x, y = observed(name)
    d = x.shape[1]
    model = SingleTaskGP(
        x,
        y,
        input_transform=Normalize(d, bounds=bounds),
        outcome_transform=Standardize(1),
    ).eval()
    model.likelihood.noise = 1e-2
    model.covar_module.lengthscale = 0.4
    return model


@functools.cache
def pathwise(name):
    return PathwiseModel(definition(name), num_samples=DRAWS, num_features=256)


ACQUISITIONS = {
    "LogEI": (1, lambda m, x, best: LogExpectedImprovement(m, best_f=best)),
    "UCB": (1, lambda m, x, best: UpperConfidenceBound(m, beta=2.0)),
    "mean": (1, lambda m, x, best: PosteriorMean(m)),
    "qLogEI": (2, lambda m, x, best: qLogExpectedImprovement(m, best_f=best)),
    "qLogNEI": (2, lambda m, x, best: qLogNoisyExpectedImprovement(m, X_baseline=x)),
    "qUCB": (2, lambda m, x, best: qUpperConfidenceBound(m, beta=2.0)),
    "qSimpleRegret": (2, lambda m, x, best: qSimpleRegret(m)),
    "qKG": (1, lambda m, x, best: qKnowledgeGradient(m, num_fantasies=4)),
    "PathwiseThompsonSampling": (2, lambda m, x, best: PathwiseThompsonSampling(m)),
}


def optimised(acquisition, bounds, q, **settings):
    with warnings.catch_warnings():
        # Few restarts and iterations: BoTorch would like more of both.
        warnings.simplefilter("ignore", BotorchWarning)
        warnings.simplefilter("ignore", RuntimeWarning)
        return optimize_acqf(
            acquisition,
            bounds=bounds,
            q=q,
            num_restarts=2,
            raw_samples=16,
            options={"maxiter": 8, "seed": 0},
            **settings,
        )


def assert_proposed(found, bounds, q):
    assert found.shape == (q, bounds.shape[1])
    assert bool(((found >= bounds[0]) & (found <= bounds[1])).all())


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", ACQUISITIONS)
def test_acquisitions_are_optimised_and_beat_random_points(name, problem):
    (bounds, x, y), (q, make) = observed(problem), ACQUISITIONS[name]
    acquisition = make(pathwise(problem), x, float(y.max()))
    torch.manual_seed(0)
    found, value = optimised(acquisition, bounds, q)
    assert_proposed(found, bounds, q)
    if name == "qKG":  # its optimum has fantasy points that are not returned
        return
    random = draw_sobol_samples(bounds, n=32, q=q, seed=1)
    with torch.no_grad():
        torch.testing.assert_close(acquisition(found.unsqueeze(0)).sum(), value.sum())
        assert float(value.sum()) > float(
            acquisition(random).reshape(32, -1).sum(1).max()
        )


@pytest.mark.parametrize("name", ACQUISITIONS)
def test_values_do_not_depend_on_the_place_in_a_batch(name):
    (bounds, x, y), (q, make) = observed("branin"), ACQUISITIONS[name]
    acquisition = make(pathwise("branin"), x, float(y.max()))
    q = acquisition.get_augmented_q_batch_size(q) if name == "qKG" else q
    points = draw_sobol_samples(bounds, n=6, q=q, seed=2)
    with torch.no_grad():
        together = acquisition(points)
        turned = acquisition(points.flip(0)).flip(0)
        nested = acquisition(points.reshape(3, 2, q, 2)).reshape(together.shape)
        alone = torch.cat([acquisition(points[i : i + 1]) for i in range(6)])
    for other in (turned, nested, alone):
        torch.testing.assert_close(other, together, rtol=1e-9, atol=1e-10)


WITH_SAMPLER = {
    "qLogEI": functools.partial(qLogExpectedImprovement, best_f=-20.0),
    "qLogNEI": functools.partial(qLogNoisyExpectedImprovement, prune_baseline=False),
    "qUCB": functools.partial(qUpperConfidenceBound, beta=2.0),
    "LogEI": functools.partial(LogExpectedImprovement, best_f=-20.0),
    "UCB": functools.partial(UpperConfidenceBound, beta=2.0),
}


@pytest.mark.parametrize("name", WITH_SAMPLER)
def test_values_are_those_of_the_closed_form_posterior(name):
    bounds, x, _ = observed("branin")
    make, exact = WITH_SAMPLER[name], definition("branin")
    own = PathwiseModel(exact, num_samples=1024, seed=3)
    points = draw_sobol_samples(bounds, n=24, q=2 if name[0] == "q" else 1, seed=5)
    settings = {"X_baseline": x} if name == "qLogNEI" else {}
    ours, theirs = dict(settings), dict(settings)
    if name[0] == "q":
        ours["sampler"] = PathSampler(torch.Size([2048]))
        theirs["sampler"] = SobolQMCNormalSampler(torch.Size([4096]), seed=0)
    with torch.no_grad():
        found, truth = make(own, **ours)(points), make(exact, **theirs)(points)
    if "Log" in name:
        found, truth = found.exp(), truth.exp()
    # 1,024 functions and their mirror images: 3 % of a deviation and of its mean.
    assert float((found - truth).abs().max() / truth.abs().max()) < 0.1


def test_acquisitions_in_closed_form_are_refused_by_name():
    bounds, _, _ = observed("branin")
    model = pathwise("branin")
    points = draw_sobol_samples(bounds, n=8, q=1, seed=5)
    with pytest.raises(AttributeError, match="qMaxValueEntropy"):
        qMaxValueEntropy(model, points.squeeze(1))(points)
    with pytest.raises(AttributeError, match="qJointEntropySearch"):
        qJointEntropySearch(model, points[:4, 0], torch.ones(4, 1).double())(points)
    # One point at a time has a lower bound from mean and variance.
    bound = qLowerBoundMaxValueEntropy(model, points.squeeze(1))(points)
    assert bool(bound.isfinite().all())
    with pytest.raises(UnsupportedError, match=r"posterior.*efficient_loo_cv.*definit"):
        efficient_loo_cv(model)
    with pytest.raises(UnsupportedError, match=r"posterior\(X\)"):
        model(points)
    with pytest.raises(RuntimeError, match="underlying GP object"):
        ExactMarginalLogLikelihood(model.likelihood, model)


def test_a_batch_found_one_by_one_is_one_of_different_points():
    bounds, x, _ = observed("branin")
    acquisition = qLogNoisyExpectedImprovement(pathwise("branin"), X_baseline=x)
    found, _ = optimised(acquisition, bounds, 3, sequential=True)
    assert_proposed(found, bounds, 3)
    assert float(torch.pdist(found).min()) > 1e-3


def test_thompson_sampling_among_candidates_takes_a_new_function_each_time():
    bounds, _, _ = observed("hartmann")
    candidates = draw_sobol_samples(bounds, n=300, q=1, seed=3).squeeze(1)
    model = PathwiseModel(definition("hartmann"), num_samples=8, num_features=256)
    choose = MaxPosteriorSampling(model, replacement=True)
    with torch.no_grad():
        chosen = torch.cat([choose(candidates, num_samples=4) for _ in range(2)])
        values = model.posterior(candidates).values.squeeze(-1)
    assert torch.equal(chosen, candidates[values.argmax(1)])


def test_optimised_paths_are_not_below_their_values_at_random_points():
    bounds, _, _ = observed("branin")
    model = pathwise("branin")
    paths = PathwiseThompsonSampling(model)
    paths.redraw(2)
    best, values = optimize_posterior_samples(
        paths=paths.samples, bounds=bounds, raw_samples=64, num_restarts=4
    )
    random = draw_sobol_samples(bounds, n=64, q=1, seed=0).squeeze(1)
    assert best.shape[-1] == 2
    with torch.no_grad():
        assert bool(
            (values.flatten() >= paths.samples(random).amax((-1, -2)).min()).all()
        )


@functools.cache
def two_objectives():
    """BraninCurrin, its bounds, and models of its two outputs."""
    function = BraninCurrin(negate=True).double()
    x = draw_sobol_samples(function.bounds, n=16, q=1, seed=0).squeeze(1)
    y = function(x)
    singles = [
        SingleTaskGP(x, y[:, i : i + 1], outcome_transform=Standardize(1)).eval()
        for i in range(2)
    ]
    joint = SingleTaskGP(x, y, outcome_transform=Standardize(2)).eval()
    return function, x, singles, joint


OBJECTIVE_MODELS = {
    "one model of two outputs": lambda singles, joint, own: own(joint),
    "a model of a list": lambda singles, joint, own: own(ModelListGP(*singles)),
    "a list of models": lambda singles, joint, own: ModelList(*map(own, singles)),
}


@pytest.mark.parametrize("name", OBJECTIVE_MODELS)
def test_hypervolume_improvement_of_two_objectives(name, monkeypatch):
    # BoTorch would compile a kernel of its own first, for most of a minute.
    monkeypatch.setattr(logei, "_load_attempted", True)
    function, x, singles, joint = two_objectives()
    own = functools.partial(PathwiseModel, num_samples=DRAWS, num_features=256)
    acquisition = qLogNoisyExpectedHypervolumeImprovement(
        model=OBJECTIVE_MODELS[name](singles, joint, own),
        ref_point=function.ref_point,
        X_baseline=x,
        prune_baseline=True,
    )
    torch.manual_seed(0)
    found, value = optimised(acquisition, function.bounds, 2)
    assert_proposed(found, function.bounds, 2)
    points = draw_sobol_samples(function.bounds, n=4, q=2, seed=2)
    with torch.no_grad():
        together = acquisition(points)
        torch.testing.assert_close(acquisition(points.flip(0)).flip(0), together)
        assert float(value) > float(together.max())
