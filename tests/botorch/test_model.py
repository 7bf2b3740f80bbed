"""``PathwiseModel`` against the exact posterior of its definition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from botorch.acquisition.objective import (
    ExpectationPosteriorTransform,
    ScalarizedPosteriorTransform,
)
from botorch.exceptions.errors import UnsupportedError
from botorch.models import MultiTaskGP, SingleTaskGP
from botorch.models.model import ModelList
from botorch.models.transforms import Log, Normalize, Standardize
from botorch.models.transforms.input import InputPerturbation

from sgdgp import CG, UnsupportedModelError
from sgdgp.botorch import PathPosterior, PathwiseModel
from tests.botorch import problems
from tests.botorch.problems import inputs, pathwise, targets

pytestmark = pytest.mark.filterwarnings(
    "ignore::botorch.exceptions.warnings.InputDataWarning"
)

X = inputs(5, 7, 3)
DEFINITIONS = {
    "single": problems.single,
    "batched": problems.batched,
    "listed": problems.listed,
    "correlated": problems.correlated,
}


@pytest.fixture(scope="module", params=list(DEFINITIONS))
def pair(request):
    """A definition and its model."""
    definition = DEFINITIONS[request.param]()
    return definition, pathwise(definition, num_samples=512)


def test_mean_is_that_of_the_definition(pair):
    definition, model = pair
    torch.testing.assert_close(
        model.posterior(X).mean, definition.posterior(X).mean, rtol=1e-8, atol=1e-8
    )


def test_variance_is_that_of_the_definition(pair):
    definition, model = pair
    exact = definition.posterior(X).variance
    torch.testing.assert_close(model.posterior(X).variance, exact, rtol=1e-6, atol=1e-9)
    poor = pathwise(definition, num_samples=2, num_features=4)
    torch.testing.assert_close(poor.posterior(X).variance, exact, rtol=1e-6, atol=1e-9)
    noisy = definition.posterior(X, observation_noise=True).variance
    found = poor.posterior(X, observation_noise=True).variance
    torch.testing.assert_close(found, noisy, rtol=1e-6, atol=1e-9)


def test_variance_of_many_rows_needs_few_functions(monkeypatch):
    monkeypatch.setattr("sgdgp.posterior.variances.EXACT_ROWS", 10)
    definition = problems.single(60)
    model = pathwise(definition, num_samples=16)
    ratio = model.posterior(X).variance / definition.posterior(X).variance
    # Squares of 16 values would be off by a third.
    assert (ratio - 1).abs().max() < 0.02


def test_shapes_follow_the_batches(pair):
    _, model = pair
    posterior = model.posterior(X)
    m = model.num_outputs
    assert posterior.mean.shape == (3, 5, m)
    assert posterior.values.shape == (512, 3, 5, m)
    assert posterior.rsample(torch.Size([2, 3])).shape == (2, 3, 3, 5, m)
    assert posterior._extended_shape(torch.Size([4])) == (4, 3, 5, m)


def test_a_point_has_the_same_value_wherever_it_stands(pair):
    _, model = pair
    alone = model.posterior(X[1, 2:3]).values
    torch.testing.assert_close(
        alone, model.posterior(X).values[:, 1, 2:3], rtol=1e-10, atol=1e-10
    )


def test_chosen_outputs_are_those_of_all(pair):
    _, model = pair
    wanted = [model.num_outputs - 1]
    whole, part = model.posterior(X), model.posterior(X, output_indices=wanted)
    subset = model.subset_output(wanted)
    torch.testing.assert_close(part.values, whole.values[..., wanted])
    torch.testing.assert_close(subset.posterior(X).values, part.values)
    assert subset.num_outputs == 1


def test_outputs_are_given_in_the_order_asked_for():
    model = pathwise(problems.batched())
    swapped = model.posterior(X, output_indices=[1, 0]).mean
    torch.testing.assert_close(swapped, model.posterior(X).mean.flip(-1))


def test_outputs_with_equal_kernels_are_independent():
    x = inputs(20)
    definition = problems.single(20)
    model = pathwise(definition, train_X=x, train_Y=targets(x, 2), num_samples=256)
    # Far from the data, where a posterior is its prior.
    far = inputs(1, 3) + 100
    first, second = model.posterior(far).values[:, 0].mT
    correlation = torch.corrcoef(torch.stack([first, second]))[0, 1]
    assert correlation.abs() < 4 / 256**0.5


def test_models_in_a_list_do_not_share_their_draws():
    x = inputs(20)
    one = pathwise(problems.single(20), train_X=x, train_Y=targets(x, 2)[:, :1])
    two = pathwise(problems.single(20), train_X=x, train_Y=targets(x, 2)[:, 1:])
    samples = ModelList(one, two).posterior(inputs(1, 3) + 100)
    values = samples.rsample(torch.Size([problems.SAMPLES]))[:, 0]
    assert torch.corrcoef(values.mT)[0, 1].abs() < 4 / problems.SAMPLES**0.5


def test_a_change_of_hyperparameters_is_noticed():
    definition = problems.single()
    model = pathwise(definition)
    before = model.posterior(X).mean
    with torch.no_grad():
        definition.covar_module.raw_lengthscale += 0.5
    after = model.posterior(X).mean
    definition.prediction_strategy = None
    definition.train()
    assert (before - after).abs().max() > 1e-3
    torch.testing.assert_close(after, definition.posterior(X).mean)


def test_a_loaded_state_dict_is_noticed():
    source = problems.single()
    with torch.no_grad():
        source.covar_module.raw_lengthscale -= 0.4
    model, other = pathwise(problems.single()), pathwise(source)
    model.posterior(X)
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(model.posterior(X).mean, other.posterior(X).mean)


@pytest.mark.parametrize("asked_before", [False, True])
@pytest.mark.parametrize("make", [problems.single, problems.batched, problems.listed])
def test_new_data_of_the_definition_are_noticed(make, asked_before):
    definition = make()
    model = pathwise(definition)
    part = model.subset_output([0])
    copied = copy.deepcopy(model)
    grown = model.condition_on_observations(X[0], targets(X[0], model.num_outputs))
    before = model.posterior(X).mean if asked_before else copied.posterior(X).mean
    for member in getattr(definition, "models", [definition]):
        x, y = member.train_inputs[0], member.train_targets
        member.set_train_data(x[..., :15, :], y[..., :15] - 3, strict=False)
    after = model.posterior(X).mean
    torch.testing.assert_close(part.posterior(X).mean, after[..., :1])
    # Others have definitions of their own.
    torch.testing.assert_close(copied.posterior(X).mean, before)
    assert len(grown.train_inputs[0]) == 30
    assert len(model.train_inputs[0]) == 15
    definition.eval()
    torch.testing.assert_close(after, definition.posterior(X).mean)
    # What the definition still has in float64 are the same data.
    model.float()
    assert model.posterior(X.float()).mean.dtype == torch.float32


def test_data_that_were_given_stay():
    x = inputs(20, 4)
    model = pathwise(problems.single(), train_X=x, train_Y=targets(x))
    before = model.posterior(X).mean
    model.definition.set_train_data(inputs(5), inputs(5)[:, 0], strict=False)
    assert torch.equal(model.posterior(X).mean, before)


def test_new_data_are_checked_before_anything_is_solved(monkeypatch):
    model = pathwise(problems.single())
    monkeypatch.setattr("sgdgp.botorch.conditioned_model.condition", None)
    new, y = inputs(3, 11), targets(inputs(3, 11))
    for x, values in (
        (new, y[:2]),
        (new[:, :1], y),
        (new, y[:, 0]),
        (new, y.expand(3, 2)),
        (new.expand(4, 3, 2), y[:2]),
        (new[:, :1].expand(4, 3, 1), y),
        (new, y.expand(4, 3, 1)[..., 0]),
    ):
        with pytest.raises(ValueError, match=r"X|Y"):
            model.condition_on_observations(x, values)
    with pytest.raises(ValueError, match="noise"):
        model.condition_on_observations(new, y, noise=y[:2])


def test_nothing_is_solved_twice():
    model = pathwise(problems.single())
    assert model.posteriors[0] is model.posteriors[0]
    assert model.subset_output([0]).posteriors[0] is model.posteriors[0]


def test_the_definition_and_the_global_generator_stay_as_they_are():
    definition = problems.single()
    state = copy.deepcopy(definition.state_dict())
    before = torch.random.get_rng_state()
    model = pathwise(definition)
    model.posterior(X, observation_noise=True).rsample(torch.Size([5]))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(state[k], v) for k, v in definition.state_dict().items())


def test_transforms_may_be_given_beside_the_definition():
    inside = problems.single()
    x = inputs(25)
    bare = SingleTaskGP(
        torch.rand(3, 2, dtype=torch.float64),
        torch.randn(3, 1, dtype=torch.float64),
        outcome_transform=None,
    )
    bare.load_state_dict(inside.state_dict(), strict=False)
    model = pathwise(
        bare,
        train_X=x,
        train_Y=targets(x),
        input_transform=Normalize(2),
        outcome_transform=Standardize(1),
    )
    torch.testing.assert_close(model.posterior(X).mean, inside.posterior(X).mean)
    new = inputs(4, 11)
    grown = [
        m.condition_on_observations(new, targets(new)).posterior(X).mean
        for m in (model, pathwise(inside))
    ]
    torch.testing.assert_close(*grown)
    given = torch.full((1, 1), 0.3, dtype=torch.float64)
    noisy = [
        m.posterior(X, observation_noise=given).variance - m.posterior(X).variance
        for m in (model, pathwise(inside))
    ]
    torch.testing.assert_close(*noisy)
    with pytest.raises(ValueError, match="input_transform"):
        pathwise(inside, input_transform=Normalize(2))


def test_values_pass_through_a_transform_that_is_not_affine():
    definition = problems.single(log=True)
    model = pathwise(definition, num_samples=512)
    posterior, exact = model.posterior(X), definition.posterior(X)
    assert (posterior.values > 0).all()
    # Of the log-normal, by 512 functions and their mirror images.
    ratio = posterior.mean / exact.mean
    assert (ratio - 1).abs().max() < 0.1
    assert (ratio.mean() - 1).abs() < 0.02
    # The values at the mean of the logarithm are not the mean of the values.
    assert (definition.posterior(X)._posterior.mean.exp() / exact.mean).min() < 0.8
    ratio = posterior.variance / exact.variance
    assert (ratio.mean() - 1).abs() < 0.2
    bare = SingleTaskGP(inputs(25), targets(inputs(25)), outcome_transform=None)
    bare.load_state_dict(definition.state_dict(), strict=False)
    given = pathwise(
        bare,
        train_X=inputs(25),
        train_Y=targets(inputs(25)),
        input_transform=Normalize(2),
        outcome_transform=Log(),
        num_samples=512,
    )
    torch.testing.assert_close(given.posterior(X).mean, posterior.mean)


def test_known_noise_is_used():
    x, y = inputs(25), targets(inputs(25))
    noise = torch.linspace(0.01, 0.5, 25, dtype=torch.float64).unsqueeze(1)
    exact = SingleTaskGP(x, y, noise, outcome_transform=Standardize(1))
    estimated = SingleTaskGP(x, y, outcome_transform=Standardize(1))
    bare = SingleTaskGP(x, y, outcome_transform=None)
    given = _data(x, y, noise)
    for model in (
        pathwise(exact),
        pathwise(estimated, **given),
        pathwise(bare, **given, outcome_transform=Standardize(1)),
    ):
        torch.testing.assert_close(model.posterior(X).mean, exact.posterior(X).mean)


def test_known_noise_may_differ_between_outputs():
    x, y = inputs(25), targets(inputs(25), 2)
    noise = torch.tensor([0.01, 0.5], dtype=torch.float64).expand(25, 2)
    exact = SingleTaskGP(x, y, noise, outcome_transform=None)
    single = SingleTaskGP(x, y[:, :1], outcome_transform=None)
    model = pathwise(single, **_data(x, y, noise))
    torch.testing.assert_close(model.posterior(X).mean, exact.posterior(X).mean)


def _data(x, y, noise):
    return {"train_X": x, "train_Y": y, "train_Yvar": noise}


def test_observation_noise_adds_the_likelihoods():
    definition = problems.batched()
    model = pathwise(definition)
    quiet, noisy = model.posterior(X), model.posterior(X, observation_noise=True)
    exact = definition.posterior(X, observation_noise=True).variance
    torch.testing.assert_close(
        noisy.variance - quiet.variance, exact - definition.posterior(X).variance
    )
    spread = (noisy.values - quiet.values).square().mean((0, 1, 2))
    ratio = spread / (noisy.variance - quiet.variance).mean((0, 1))
    # Noise is the same in every t-batch: 64 x 5 draws.
    assert (ratio - 1).abs().max() < 4 * (2 / 320) ** 0.5
    given = torch.full((1, 2), 0.3, dtype=torch.float64)
    scale = definition.outcome_transform.stdvs.flatten()
    torch.testing.assert_close(
        model.posterior(X, observation_noise=given).variance - quiet.variance,
        (0.3 * scale**2).expand(3, 5, 2),
    )


def test_noise_is_the_same_in_every_t_batch():
    model = pathwise(problems.single())
    x = X[:1].expand(3, 5, 2)
    values = model.posterior(x, observation_noise=True).values
    torch.testing.assert_close(values[:, 0], values[:, 2], rtol=1e-12, atol=1e-12)
    fewer = model.posterior(X[0, :3], observation_noise=True).values
    torch.testing.assert_close(fewer, values[:, 0, :3])


def test_scalarisations_act_on_values():
    definition = problems.batched()
    model = pathwise(definition)
    weights = torch.tensor([0.3, -2.0], dtype=torch.float64)
    transform = ScalarizedPosteriorTransform(weights, offset=1.5)
    posterior = model.posterior(X, posterior_transform=transform)
    exact = definition.posterior(X, posterior_transform=transform)
    torch.testing.assert_close(posterior.mean, exact.mean)
    assert posterior.mean.shape == (3, 5, 1)
    values = 1.5 + model.posterior(X).values @ weights
    torch.testing.assert_close(posterior.values, values.unsqueeze(-1))
    torch.testing.assert_close(posterior.variance, exact.variance, rtol=1e-6, atol=0.0)
    mean = ExpectationPosteriorTransform(n_w=5)
    average = model.posterior(X, posterior_transform=mean)
    torch.testing.assert_close(
        average.mean, model.posterior(X).mean.mean(1, keepdim=True)
    )
    assert average._extended_shape() == (3, 1, 2)
    every = model.posterior(X).rsample(torch.Size([2 * problems.SAMPLES]))
    torch.testing.assert_close(
        average.variance, every.mean(2, keepdim=True).var(0, correction=0)
    )


def test_correlated_outputs_are_scalarised_with_their_correlation():
    model = pathwise(problems.correlated(), num_samples=1024)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    transform = ScalarizedPosteriorTransform(weights)
    ours = model.posterior(X, posterior_transform=transform).variance
    joint = model.posteriors[0].paths.joint(X[0], None).covariance_matrix
    exact = joint.unfold(0, 2, 2).unfold(1, 2, 2).sum((2, 3)).diagonal()
    assert (ours[0, :, 0] / exact - 1).abs().max() < 0.2


def test_new_data_move_the_same_functions(pair):
    definition, model = pair
    new = inputs(4, 11)
    y = targets(new, model.num_outputs)
    grown = model.condition_on_observations(new, y)
    assert isinstance(grown, PathwiseModel)
    fresh = _exact_with(definition, new, y)
    torch.testing.assert_close(
        grown.posterior(X).mean, fresh.posterior(X).mean, rtol=1e-6, atol=1e-6
    )
    # Fresh functions would have nothing to do with the old ones of the same number.
    old, now = (_deviations(m) for m in (model, grown))
    correlation = (old * now).mean() / (
        old.square().mean() * now.square().mean()
    ) ** 0.5
    assert correlation > 0.5


def _deviations(model):
    posterior = model.posterior(X)
    return posterior.values - posterior.mean


def _exact_with(definition, x, y):
    """The definition with more data and the same hyperparameters."""
    model = copy.deepcopy(definition)
    parts = getattr(model, "models", [model])
    for part, own in zip(parts, y.split(y.shape[1] // len(parts), dim=1), strict=True):
        part.train()
        transform = part.outcome_transform.eval()
        inputs_, targets_ = part.train_inputs[0], part.train_targets
        # BoTorch keeps outputs as a batch (m, n), a single one as (n,).
        as_batch, alone = inputs_.ndim == 3, targets_.ndim == 1
        old = targets_.mT if as_batch else targets_.unsqueeze(-1) if alone else targets_
        new = torch.cat([old, transform(own)[0]])
        grown = torch.cat([inputs_[0] if as_batch else inputs_, x])
        part.set_train_data(
            grown.expand(own.shape[1], -1, -1) if as_batch else grown,
            new.mT if as_batch else new[:, 0] if alone else new,
            strict=False,
        )
        part.prediction_strategy = None
    return model.eval()


def test_new_data_of_one_output_leave_the_other():
    model = pathwise(problems.batched())
    new = inputs(3, 11)
    y = targets(new, 2)
    gap = y.clone()
    gap[:, 0] = float("nan")
    grown = model.condition_on_observations(new, gap)
    torch.testing.assert_close(
        grown.posterior(X).mean[..., 0], model.posterior(X).mean[..., 0]
    )
    subset = model.subset_output([1]).condition_on_observations(new, y[:, 1:])
    torch.testing.assert_close(
        subset.posterior(X).mean, grown.posterior(X).mean[..., 1:]
    )


def test_new_data_need_noise_where_it_is_known():
    x, y = inputs(25), targets(inputs(25))
    noise = torch.full_like(y, 0.1)
    model = pathwise(SingleTaskGP(x, y, noise, outcome_transform=Standardize(1)))
    new = inputs(3, 11)
    with pytest.raises(ValueError, match="noise"):
        model.condition_on_observations(new, targets(new))
    grown = model.condition_on_observations(
        new, targets(new), noise=torch.full((3, 1), 0.2, dtype=torch.float64)
    )
    known = grown.observations[0].variances
    scale = model.definition.outcome_transform.stdvs.flatten() ** 2
    torch.testing.assert_close(known[-3:], (0.2 * scale).expand(3, 1))
    torch.testing.assert_close(known[:-3], noise)
    # Conditioned again from zero, it says the same.
    before = grown.posterior(X).mean
    with torch.no_grad():
        grown.definition.covar_module.raw_lengthscale += 1e-9
    torch.testing.assert_close(grown.posterior(X).mean, before)
    with pytest.raises(ValueError, match="noise"):
        pathwise(problems.single()).condition_on_observations(
            new, targets(new), noise=torch.full((3, 1), 0.2, dtype=torch.float64)
        )


def test_a_task_column_stays_an_input():
    x = torch.cat([inputs(24), torch.arange(24.0).remainder(2).double()[:, None]], 1)
    definition = MultiTaskGP(x, targets(x), task_feature=-1)
    model = pathwise(definition)
    points = x[:6] + torch.tensor([0.1, -0.1, 0.0])
    torch.testing.assert_close(
        model.posterior(points).mean, definition.posterior(points).mean
    )
    assert model.num_outputs == 1


def test_copies_and_pickles_have_the_same_functions():
    model = pathwise(problems.batched())
    values = model.posterior(X).values
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.posterior(X).values, values)
    assert copy.deepcopy(model).posteriors[0] is model.posteriors[0]


def test_dtype_moves_with_the_model():
    model = pathwise(problems.single()).float()
    mean = model.posterior(X.float()).mean
    assert mean.dtype == torch.float32
    torch.testing.assert_close(
        mean.double(), problems.single().posterior(X).mean, rtol=1e-3, atol=1e-3
    )


def test_any_solver_may_be_given():
    definition = problems.single()
    model = pathwise(definition, solver=CG(tolerance=1e-8))
    assert model.posteriors[0].solution.solver == "cg"
    torch.testing.assert_close(
        model.posterior(X).mean, definition.posterior(X).mean, rtol=1e-5, atol=1e-5
    )


def test_bad_arguments_are_named():
    x, y = inputs(25), targets(inputs(25))
    definition = problems.single()
    with pytest.raises(ValueError, match="train_Y"):
        PathwiseModel(definition, x)
    with pytest.raises(ValueError, match="train_X"):
        PathwiseModel(definition, train_Y=y)
    with pytest.raises(ValueError, match="train_Y"):
        PathwiseModel(definition, x, y[:7])
    with pytest.raises(ValueError, match="train_Y"):
        PathwiseModel(problems.batched(), x, y)
    with pytest.raises(ValueError, match="columns"):
        PathwiseModel(definition, x[:, :1], y)
    with pytest.raises(ValueError, match="finite"):
        PathwiseModel(definition, x, y * float("inf"))
    with pytest.raises(ValueError, match="train_Yvar"):
        PathwiseModel(definition, x, y, train_Yvar=-torch.ones_like(y))
    with pytest.raises(TypeError, match="definition"):
        PathwiseModel(torch.nn.Linear(1, 1))
    mixture = problems.single()
    mixture._is_fully_bayesian = True
    with pytest.raises(UnsupportedModelError, match="hyperparameters"):
        PathwiseModel(mixture)
    with pytest.raises(UnsupportedModelError, match="batch"):
        PathwiseModel(SingleTaskGP(x.expand(2, -1, -1), y.expand(2, -1, -1)))
    several = InputPerturbation(torch.zeros(3, 2, dtype=torch.float64))
    with pytest.raises(UnsupportedModelError, match="several points of one"):
        PathwiseModel(SingleTaskGP(x, y, input_transform=several.eval()))
    model = pathwise(definition)
    with pytest.raises(ValueError, match="X"):
        model.posterior(x[0])
    with pytest.raises(ValueError, match="float64"):
        model.posterior(x.float()).mean  # noqa: B018
    with pytest.raises(ValueError, match="output_indices"):
        model.posterior(x, output_indices=[1])
    with pytest.raises(ValueError, match="idcs"):
        model.subset_output([])
    with pytest.raises(ValueError, match="Y"):
        model.condition_on_observations(x, targets(x, 2))
    with pytest.raises(ValueError, match="X"):
        model.condition_on_observations(x[:, :1], y)


def test_other_posterior_transforms_are_tried():
    class Halved(torch.nn.Module):
        scalarize = False

        def forward(self, posterior, X=None):
            raise UnsupportedError(type(posterior).__name__)

    model = pathwise(problems.single())
    with pytest.raises(UnsupportedError, match=PathPosterior.__name__):
        model.posterior(X, posterior_transform=Halved())


def test_a_generator_is_a_seed_too():
    x = inputs(4)
    found = [
        pathwise(problems.single(), seed=torch.Generator().manual_seed(seed))
        .posterior(x)
        .values
        for seed in (1, 1, 2)
    ]
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[0], found[2])
