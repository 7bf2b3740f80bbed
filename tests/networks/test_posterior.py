"""What a posterior answers: the verbs agree with one another, whatever the inputs."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from sgdgp.networks import (
    Bernoulli,
    Categorical,
    Gaussian,
    GaussianPrediction,
    Isotropic,
    LinearisedPosterior,
    WeightCG,
    linearise,
    load,
)
from sgdgp.networks.posterior import PREDICTED_TOGETHER
from sgdgp.networks.predictive import (
    logit_variance,
    mutual_information,
    predictive_entropy,
)

C, N, K = 3, 40, 12
QUICK = {
    "num_samples": 4,
    "final_samples": K,
    "steps": 1,
    "precision": 5.0,
    "progress": False,
}


class TwoInputs(nn.Module):
    """A network of two tensors, given one after the other or by their names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(3, 6)
        self.right = nn.Linear(2, 6)
        self.head = nn.Linear(6, C)

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        hidden = torch.tanh(self.left(left) + self.right(right))
        return {"logits": self.head(hidden)}


def data() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, 5, generator=generator, dtype=torch.float64)
    return x[:, :3], x[:, 3:], x[:, :C].argmax(1)


def initialised(network: nn.Module) -> nn.Module:
    """The same weights for networks of the same parameters."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data.copy_(values)
    return network.double().eval()


@pytest.fixture(scope="module")
def classes() -> LinearisedPosterior:
    left, right, y = data()
    network = initialised(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, C)))
    x = torch.cat([left, right], 1)
    return linearise(network, Categorical(), Isotropic()).fit([(x, y)], **QUICK)


@pytest.fixture(scope="module")
def targets() -> LinearisedPosterior:
    left, right, _ = data()
    network = initialised(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)))
    x = torch.cat([left, right], 1)
    likelihood = Gaussian(per_output=True)
    return linearise(network, likelihood, Isotropic()).fit([(x, x[:, :2])], **QUICK)


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(2)).double()


def test_it_says_in_a_line_what_it_is(classes, targets):
    count = classes.weight_mean.shape[0]
    line = repr(classes)
    assert line.startswith(
        "LinearisedPosterior(likelihood='Categorical', prior='Isotropic', "
        f"weights={count}, num_samples={K}, num_examples={N}, precisions=("
    )
    assert line.endswith(f", reason={classes.reason!r})")
    assert len(line) < 400
    assert f"noise=({targets.noise[0]:.3g}, {targets.noise[1]:.3g})" in repr(targets)
    assert ">LinearisedPosterior</caption>" in targets._repr_html_()


def test_samples_are_the_network_and_the_jacobian_times_sampled_weights(
    classes, inputs
):
    jacobian = classes.tangent.at(inputs).jacobian()
    expected = classes.network_outputs(inputs) + torch.einsum(
        "bcd,dk->kbc", jacobian, classes.weight_samples
    )
    torch.testing.assert_close(classes.samples(inputs), expected)
    mean = torch.einsum("bcd,d->bc", jacobian, classes.weight_mean[:, 0])
    torch.testing.assert_close(classes.linear_mean(inputs), mean)


def test_both_links_agree_with_their_formulas_on_the_samples(classes, inputs):
    samples = classes.samples(inputs)
    outputs = classes.network_outputs(inputs)
    variance = (samples - outputs).square().mean(0)
    probit = (outputs / (1 + math.pi / 8 * variance).sqrt()).softmax(1)
    torch.testing.assert_close(classes.predict(inputs), probit)
    mean = samples.softmax(2).mean(0)
    torch.testing.assert_close(classes.predict(inputs, "monte_carlo"), mean)


def test_joint_log_prob_is_that_of_the_samples(classes, inputs):
    y = torch.arange(7) % C
    each = classes.samples(inputs).log_softmax(2)[:, torch.arange(7), y]
    expected = (each.sum(1).logsumexp(0) - math.log(K)).item()
    assert classes.joint_log_prob(inputs, y) == pytest.approx(expected)
    dyadic = classes.joint_log_prob(inputs, y, dyadic=True)
    assert dyadic == classes.joint_log_prob(inputs, y, dyadic=True, seed=0)
    assert dyadic != classes.joint_log_prob(inputs, y, dyadic=True, seed=1)


@pytest.mark.parametrize("mean", ["network", "linear"])
def test_regression_predicts_mean_variance_and_noise(targets, inputs, mean):
    targets = replace(targets, mean_of=mean)
    found = targets.predict(inputs)
    assert isinstance(found, GaussianPrediction)
    means = {"network": targets.network_outputs, "linear": targets.linear_mean}
    torch.testing.assert_close(found.mean, means[mean](inputs))
    spread = targets.samples(inputs) - found.mean
    torch.testing.assert_close(found.variance, spread.square().mean(0))
    noise = torch.tensor(targets.noise, dtype=torch.float64)
    assert noise.shape == (2,)
    torch.testing.assert_close(found.target_variance, found.variance + noise)
    y = found.mean + 0.1
    each = torch.distributions.Normal(targets.samples(inputs), noise.sqrt())
    expected = each.log_prob(y).sum((1, 2)).logsumexp(0) - math.log(K)
    assert targets.joint_log_prob(inputs, y) == pytest.approx(float(expected))


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_predictions_do_not_depend_on_the_batches(classes, inputs, batch_size: int):
    for link in ("probit", "monte_carlo"):
        torch.testing.assert_close(
            classes.predict(inputs, link, batch_size=batch_size),
            classes.predict(inputs, link),
        )
    samples = classes.samples(inputs, batch_size=batch_size)
    torch.testing.assert_close(samples, classes.samples(inputs))


def test_more_inputs_than_a_batch_are_all_predicted(classes, inputs):
    many = inputs.repeat(PREDICTED_TOGETHER // 7 + 2, 1)
    for verb in (classes.predict, classes.network_outputs, classes.linear_mean):
        found = verb(many)
        assert len(found) == len(many) > PREDICTED_TOGETHER
        torch.testing.assert_close(found[-7:], verb(inputs))


def test_the_scale_multiplies_variances_and_zero_is_the_network(classes, inputs):
    posterior = copy.copy(classes)
    before = classes.fluctuations(inputs)[1]
    posterior.scale = 4.0
    torch.testing.assert_close(posterior.fluctuations(inputs)[1], 2 * before)
    posterior.scale = 0.0
    network = classes.network_outputs(inputs).softmax(1)
    torch.testing.assert_close(posterior.predict(inputs), network)


def test_tuples_and_dicts_of_inputs_are_the_arguments_of_the_network():
    left, right, y = data()
    found = []
    for x in [(left, right), {"left": left, "right": right}]:
        posterior = linearise(
            initialised(TwoInputs()),
            Categorical(),
            Isotropic(),
            output=lambda out: out["logits"],
        ).fit([(x, y)], **QUICK)
        found.append(
            [
                posterior.predict(x),
                posterior.predict(x, "monte_carlo"),
                posterior.samples(x),
                posterior.network_outputs(x),
                posterior.linear_mean(x),
                torch.tensor(posterior.joint_log_prob(x, y)),
                torch.tensor(posterior.calibrate([(x, y)]).scale),
            ]
        )
    assert found[0][0].shape == (N, C)
    for first, second in zip(*found, strict=True):
        torch.testing.assert_close(first, second)


def test_calibration_ignores_the_scale_it_finds(classes):
    left, right, y = data()
    x = torch.cat([left, right], 1)
    posterior = copy.copy(classes)
    first = posterior.calibrate([(x, y)])
    assert posterior.scale == first.scale
    second = posterior.calibrate([(x[:9], y[:9]), (x[9:], y[9:])])
    assert second.scale == pytest.approx(first.scale)
    for name, scores in first.scores.items():
        assert second.scores[name] == pytest.approx(scores)


def test_a_calibrated_regression_comes_back_from_its_file(targets, inputs, tmp_path):
    left, right, _ = data()
    x = torch.cat([left, right], 1)
    posterior = copy.copy(targets)
    comparison = posterior.calibrate([(x, x[:, :2] + 0.3)])
    assert comparison.scores["posterior (calibrated)"]["coverage"] > 0.5
    posterior.save(tmp_path / "posterior.safetensors")
    same = load(tmp_path / "posterior.safetensors", posterior.tangent.network)
    assert same.scale == posterior.scale == comparison.scale
    assert same.noise == posterior.noise
    before, after = posterior.predict(inputs), same.predict(inputs)
    assert torch.equal(before.variance, after.variance)


def test_questions_that_have_no_answer_are_refused(classes, inputs):
    y = torch.zeros(7, dtype=torch.long)
    with pytest.raises(ValueError, match='"probit" or "monte_carlo", found \'logit\''):
        classes.predict(inputs, "logit")
    with pytest.raises(ValueError, match=r"x: expected inputs, found shape \(0, 5\)"):
        classes.predict(inputs[:0])
    with pytest.raises(TypeError, match=r"x: expected a tensor, .* found ndarray"):
        classes.predict(inputs.numpy())
    with pytest.raises(TypeError, match=r"x: expected a tensor, .* found list"):
        classes.samples([inputs])
    with pytest.raises(ValueError, match="batch_size: expected at least 1, found 0"):
        classes.predict(inputs, batch_size=0)
    with pytest.raises(ValueError, match=r"y: expected 7 targets, .* found 5"):
        classes.joint_log_prob(inputs, y[:5])
    with pytest.raises(ValueError, match=r"class indices from 0 to 2, .* found 3"):
        classes.joint_log_prob(inputs, y + 3)
    with pytest.raises(ValueError, match="at least two held-out examples"):
        classes.calibrate([(inputs[:1], y[:1])])


def test_too_many_numbers_for_the_monte_carlo_link_are_refused(
    classes, inputs, monkeypatch
):
    monkeypatch.setattr("sgdgp.networks.posterior._KEPT_NUMBERS", 10)
    y = torch.arange(7) % C
    posterior = copy.copy(classes)
    found = posterior.calibrate([(inputs, y)])
    assert math.isnan(found.scores["posterior (calibrated)"]["joint"])
    with pytest.raises(ValueError, match="7 examples with 3 outputs and 12 samples"):
        posterior.calibrate([(inputs, y)], link="monte_carlo")


def test_scores_of_strange_inputs_are_those_of_the_predictions(classes, inputs):
    probabilities = classes.predict(inputs)
    torch.testing.assert_close(
        classes.out_of_distribution_score(inputs),
        predictive_entropy(probabilities),
    )
    outputs, added = classes.fluctuations(inputs)
    for score, expected in (
        ("mutual_information", mutual_information(outputs, added)),
        ("variance", logit_variance(added)),
    ):
        found = classes.out_of_distribution_score(inputs, score, batch_size=3)
        torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="score"):
        classes.out_of_distribution_score(inputs, "temperature")


def test_regressions_are_scored_by_their_variance(targets, inputs):
    found = targets.out_of_distribution_score(inputs, "variance")
    prediction = targets.predict(inputs)
    torch.testing.assert_close(found, prediction.variance.mean(1))
    with pytest.raises(ValueError, match="regression"):
        targets.out_of_distribution_score(inputs)


class Beside(nn.Module):
    """One logit f as the two outputs (0, f)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logit = self.network(x)
        return torch.cat([torch.zeros_like(logit), logit], 1)


EXACT = {
    "steps": 0,
    "precision": 0.5,
    "final_samples": K,
    "solver": WeightCG(tolerance=1e-7),
    "progress": False,
}


def labelled(outputs: int) -> tuple[nn.Module, Tensor, Tensor]:
    x, _, _ = data()
    network = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs))
    return initialised(network.double()).eval(), x, (x[:, :outputs] > 0.2).long()


def test_one_logit_is_two_classes():
    network, x, y = labelled(1)
    one = linearise(network, Bernoulli(), Isotropic()).fit([(x, y[:, 0])], **EXACT)
    two = linearise(Beside(network).eval(), Categorical(), Isotropic()).fit(
        [(x, y[:, 0])], **EXACT
    )
    torch.testing.assert_close(one.weight_mean, two.weight_mean, rtol=0, atol=1e-5)
    evidence = [p.log_marginal_likelihood([(x, y[:, 0])]).value for p in (one, two)]
    assert evidence[0] == pytest.approx(evidence[1], abs=1e-5)
    two.weight_samples = one.weight_samples
    for link in ("probit", "monte_carlo"):
        found = one.predict(x, link)
        torch.testing.assert_close(found[:, 0], two.predict(x, link)[:, 1])
    for score in ("entropy", "mutual_information"):
        torch.testing.assert_close(
            one.out_of_distribution_score(x, score),
            two.out_of_distribution_score(x, score),
        )
    left, right = (p.calibrate([(x, y[:, 0])]) for p in (one, two))
    assert left.scores.keys() == right.scores.keys()
    for name, scores in left.scores.items():
        assert scores == pytest.approx(right.scores[name], rel=1e-6, nan_ok=True)


def test_labels_are_predicted_one_by_one(tmp_path):
    network, x, y = labelled(2)
    posterior = linearise(network, Bernoulli()).fit([(x, y)], **QUICK)
    f, added = posterior.fluctuations(x)
    variance = added.square().mean(-1)
    expected = (f / (1 + math.pi / 8 * variance).sqrt()).sigmoid()
    torch.testing.assert_close(posterior.predict(x), expected)
    each = (f.unsqueeze(-1) + added).sigmoid()
    torch.testing.assert_close(posterior.predict(x, "monte_carlo"), each.mean(-1))
    right = torch.where(y.unsqueeze(-1) > 0, each, 1 - each).log().sum((0, 1))
    joint = float(right.logsumexp(0)) - math.log(K)
    assert posterior.joint_log_prob(x, y) == pytest.approx(joint)
    assert posterior.calibrate([(x, y)]).num_examples == 2 * N
    path = tmp_path / "labels.safetensors"
    posterior.save(path)
    torch.testing.assert_close(load(path, network).predict(x), posterior.predict(x))


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (torch.full((N, 2), 0.5), "labels 0 and 1"),
        (torch.zeros(N), "one label per output"),
    ],
    ids=["soft", "too few"],
)
def test_what_is_no_label_is_refused(y, message):
    network, x, _ = labelled(2)
    with pytest.raises(ValueError, match=message):
        linearise(network, Bernoulli()).fit([(x, y)], **QUICK)
