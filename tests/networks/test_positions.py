"""Several labels an example: the same as an example for each label that counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from sgdgp.networks import Categorical, Isotropic, linearise, load
from sgdgp.networks.calibration import compare

EXAMPLES, POSITIONS, CLASSES = 12, 5, 3
SETTINGS = {"precision": 1.0, "final_samples": 4, "steps": 5, "progress": False}
IGNORED = -100


@pytest.fixture(scope="module")
def network():
    """Of every position alone, so that positions may be examples."""
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES)
    return nn.Sequential(*layers).double().eval()


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(1)
    shape = (EXAMPLES, POSITIONS, 4)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = torch.randint(CLASSES, shape[:2], generator=generator)
    ignored = torch.rand(shape[:2], generator=generator) < 0.4
    ignored[3] = True
    return x, y.masked_fill(ignored, IGNORED), ~ignored


@pytest.mark.filterwarnings("ignore:Learning has not settled")
@pytest.mark.parametrize("solver", ["cholesky", "dual"])
def test_ignored_positions_are_as_if_they_were_not_there(network, data, solver):
    x, y, counted = data
    likelihood = Categorical(ignore_index=IGNORED)
    settings = {**SETTINGS, "solver": solver}
    if solver == "dual":  # learning by samples depends on which are drawn
        settings |= {"steps": 0}
    whole = linearise(network, likelihood, Isotropic()).fit(
        torch.utils.data.DataLoader(TensorDataset(x, y), batch_size=5), **settings
    )
    removed = TensorDataset(x[counted], y[counted])
    fewer = linearise(network, Categorical(), Isotropic()).fit(removed, **settings)
    close = {"rtol": 1e-7, "atol": 1e-7} if solver == "cholesky" else {"rtol": 0.2}
    if solver == "dual":
        close["atol"] = 0.05
    torch.testing.assert_close(whole.precisions, fewer.precisions, **close)
    torch.testing.assert_close(whole.weight_mean, fewer.weight_mean, **close)
    one = whole.log_marginal_likelihood(TensorDataset(x, y))
    other = fewer.log_marginal_likelihood(removed)
    assert one.value == pytest.approx(
        other.value, rel=1e-2 if solver == "dual" else 1e-9
    )
    # The same samples for what follows: noise is drawn for examples.
    fewer.weight_samples = whole.weight_samples
    torch.testing.assert_close(
        whole.predict(x)[counted], fewer.predict(x[counted]), rtol=1e-9, atol=1e-12
    )
    assert whole.predict(x).shape == (EXAMPLES, POSITIONS, CLASSES)
    assert whole.joint_log_prob(x, y) == pytest.approx(
        fewer.joint_log_prob(x[counted], y[counted])
    )
    found = whole.calibrate(TensorDataset(x, y))
    expected = fewer.calibrate(removed)
    assert found.num_examples == expected.num_examples == int(counted.sum())
    assert found.scale == pytest.approx(expected.scale)
    for name, scores in expected.scores.items():
        assert found.scores[name] == pytest.approx(scores, nan_ok=True)


@pytest.mark.filterwarnings("ignore:Learning has not settled")
def test_examples_with_one_label_may_be_without_it(network, data):
    x, y, counted = data
    settings = {**SETTINGS, "solver": "cholesky"}
    whole = linearise(network, Categorical(ignore_index=IGNORED), Isotropic()).fit(
        TensorDataset(x.flatten(0, 1), y.flatten()), **settings
    )
    fewer = linearise(network, Categorical(), Isotropic()).fit(
        TensorDataset(x[counted], y[counted]), **settings
    )
    torch.testing.assert_close(whole.precisions, fewer.precisions)
    torch.testing.assert_close(whole.weight_mean, fewer.weight_mean)


def test_scores_add_up_over_positions(network, data):
    x, y, _ = data
    likelihood = Categorical(ignore_index=IGNORED)
    posterior = linearise(network, likelihood, Isotropic()).fit(
        TensorDataset(x, y), **{**SETTINGS, "steps": 0}
    )
    entropy = -(posterior.predict(x).log() * posterior.predict(x)).sum((1, 2))
    torch.testing.assert_close(posterior.out_of_distribution_score(x), entropy)
    for score in ("mutual_information", "variance"):
        found = posterior.out_of_distribution_score(x, score)
        assert found.shape == (EXAMPLES,)
        assert bool((found > 0).all())


def test_files_know_the_positions(network, data, tmp_path):
    x, y, _ = data
    posterior = linearise(network, Categorical(ignore_index=IGNORED)).fit(
        TensorDataset(x, y), **{**SETTINGS, "steps": 0}
    )
    posterior.save(tmp_path / "posterior")
    found = load(tmp_path / "posterior", network)
    assert found.likelihood == posterior.likelihood
    torch.testing.assert_close(found.predict(x), posterior.predict(x))


def test_a_comparison_needs_two_positions_with_labels():
    y = torch.full((2, 2), IGNORED)
    y[0, 0] = 1
    with pytest.raises(ValueError, match="1 held-out"):
        compare(
            Categorical(ignore_index=IGNORED),
            torch.randn(2, 6),
            y,
            variance=torch.ones(2, 6),
        )
