"""What is drawn of a posterior is what its verbs say."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

import sgdgp
from sgdgp.networks import Categorical, Gaussian, LinearisedPosterior, linearise
from tests.models import gp, toy_data


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def one():
    return sgdgp.condition(gp(d=1, n=40), num_samples=8)


@pytest.fixture(scope="module")
def two():
    """Independent outputs of one input, the second with a gap."""
    x, y = toy_data(30, 1)
    y = torch.stack([y, 3 - 2 * y], 1)
    y[:10, 1] = torch.nan
    return sgdgp.condition(gp(d=1), x, y, num_samples=4)


@pytest.fixture(scope="module")
def network() -> LinearisedPosterior:
    x, y = toy_data(40, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double().eval()
    fitting = linearise(model, Gaussian(noise=0.04))
    return fitting.fit([(x, y[:, None])], steps=1, final_samples=6, progress=False)


def grid(n: int = 21) -> torch.Tensor:
    return torch.linspace(-1, 1, n, dtype=torch.float64)


def labelled(ax, label):
    """The line or band with this label."""
    handles, labels = ax.get_legend_handles_labels()
    return handles[labels.index(label)]


def drawn(line) -> torch.Tensor:
    return torch.tensor(line.get_ydata(), dtype=torch.float64)


def band(collection, t) -> torch.Tensor:
    """Lower and upper edge (2, n) of a filled band over t (n,)."""
    vertices = collection.get_paths()[0].vertices
    edges = [vertices[vertices[:, 0] == float(place), 1] for place in t]
    return torch.tensor([[edge.min(), edge.max()] for edge in edges]).mT


def test_mean_band_samples_and_data_of_one_output(one):
    t = grid()
    ax = sgdgp.plot.posterior(one, t.flip(0), samples=3)
    mean, half = one.mean(t), 2 * one.variance(t).sqrt()
    assert torch.allclose(drawn(labelled(ax, "mean")), mean)
    edges = band(labelled(ax, "± 2 standard deviations"), t)
    assert torch.allclose(edges, torch.stack([mean - half, mean + half]))
    places = [line for line in ax.get_lines() if len(line.get_xdata()) == len(t)]
    samples = torch.stack([drawn(line) for line in places if line.get_lw() < 1])
    assert torch.allclose(samples, one.samples(t)[:3])
    assert labelled(ax, "3 sample functions") in places
    x, y = toy_data(40, 1)
    inside = x[:, 0].abs() <= 1
    assert torch.allclose(drawn(labelled(ax, "data")), y[inside])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x", "f(x)")


def test_columns_and_vectors_are_alike_and_nothing_more_needs_samples(one):
    t = grid()
    axes = [sgdgp.plot.posterior(one, x, samples=0) for x in (t, t[:, None])]
    means = [drawn(labelled(ax, "mean")) for ax in axes]
    assert torch.equal(*means)
    assert axes[0].get_legend_handles_labels()[1] == [
        "mean",
        "± 2 standard deviations",
        "data",
    ]


def test_of_many_data_some_are_drawn_and_the_legend_says_how_many():
    posterior = sgdgp.condition(gp(d=1, n=2_100), num_samples=1, solver="cg")
    ax = sgdgp.plot.posterior(posterior, 1.5 * grid(), samples=0)
    points = labelled(ax, "data (2,000 of 2,100)")
    assert len(points.get_xdata()) == 2_000


def test_each_output_has_a_colour_and_its_own_data(two):
    t = grid()
    ax = sgdgp.plot.posterior(two, t, samples=2)
    mean, _ = two.predict(t, batch_size=100)
    x, y = toy_data(30, 1)
    inside = x[:, 0].abs() <= 1
    seen = {0: y[inside], 1: (3 - 2 * y)[10:][inside[10:]]}
    for k in range(2):
        line = labelled(ax, f"output {k}")
        assert torch.allclose(drawn(line), mean[:, k])
        colour = line.get_color()
        same = [other for other in ax.get_lines() if other.get_color() == colour]
        assert len(same) == 1 + 2 + 1
        points = [other for other in same if other.get_marker() == "."]
        assert torch.allclose(drawn(points[0]), seen[k])


def test_data_of_a_multitask_model_are_in_the_users_units():
    from tests.models import multitask_gp

    model = multitask_gp()
    posterior = sgdgp.condition(model, num_samples=2)
    found = sgdgp.plot.functions.observed_data(posterior.solved)
    assert len(found) == model.train_targets.shape[1]
    for task, (x, y) in enumerate(found):
        assert torch.allclose(x, model.train_inputs[0])
        assert torch.allclose(y, model.train_targets[:, task])


def test_a_networks_band_is_that_of_its_function(network):
    t = grid()
    ax = sgdgp.plot.posterior(network, t, samples=2)
    prediction = network.predict(t[:, None])
    mean, half = prediction.mean[:, 0], 2 * prediction.variance[:, 0].sqrt()
    assert torch.allclose(drawn(labelled(ax, "mean")), mean)
    edges = band(labelled(ax, "± 2 standard deviations"), t)
    assert torch.allclose(edges, torch.stack([mean - half, mean + half]))
    x, y = toy_data(40, 1)
    assert torch.allclose(drawn(labelled(ax, "data")), y[x[:, 0].abs() <= 1])


def test_several_are_drawn_into_given_axes(one, network):
    _, ax = plt.subplots()
    assert sgdgp.plot.posterior(one, grid(), ax=ax) is ax
    assert sgdgp.plot.posterior(network, grid(), ax=ax) is ax
    means = [line for line in ax.get_lines() if line.get_label() == "mean"]
    assert len({line.get_color() for line in means}) == 2


def test_a_slice_goes_through_its_point():
    posterior = sgdgp.condition(gp(d=3), num_samples=4)
    x = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)
    ax = sgdgp.plot.slice(posterior, x, 1, samples=2)
    line = labelled(ax, "mean")
    places = torch.tensor(line.get_xdata(), dtype=torch.float64)
    data = posterior.problem.x[:, 1]
    assert torch.allclose(places[[0, -1]], torch.stack([data.min(), data.max()]))
    points = x.repeat(len(places), 1)
    points[:, 1] = places
    mean, half = posterior.mean(points), 2 * posterior.variance(points).sqrt()
    assert torch.allclose(drawn(line), mean)
    edges = band(labelled(ax, "± 2 standard deviations"), places)
    assert torch.allclose(edges, torch.stack([mean - half, mean + half]))
    assert ax.get_xlabel() == "x[1]"
    assert ax.get_title() == "x[0] = 0.3, x[2] = 0.1"
    assert any(line.get_xdata() == [-0.2, -0.2] for line in ax.get_lines()[-1:])


def test_a_slice_takes_values_where_the_data_are_not_known(network):
    without = LinearisedPosterior(**{**vars(network), "stream": None})
    x = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="values: expected where to draw"):
        sgdgp.plot.slice(without, x, 0)
    ax = sgdgp.plot.slice(without, x, 0, values=grid(5).flip(0))
    assert torch.allclose(
        drawn(labelled(ax, "mean")), without.predict(grid(5)[:, None]).mean[:, 0]
    )


@pytest.mark.parametrize(
    ("error", "says", "call"),
    [
        (TypeError, "p: .*found int", lambda p: sgdgp.plot.posterior(3, grid())),
        (TypeError, "x: .*Tensor", lambda p: sgdgp.plot.posterior(p, [0.0, 1.0])),
        (
            ValueError,
            r"x: .*found \(3, 2\); sgdgp.plot.slice",
            lambda p: sgdgp.plot.posterior(p, grid(6).reshape(3, 2)),
        ),
        (ValueError, "x: .*NaN", lambda p: sgdgp.plot.posterior(p, grid() / 0)),
        (
            ValueError,
            "samples: ",
            lambda p: sgdgp.plot.posterior(p, grid(), samples=-1),
        ),
        (TypeError, "ax: .*str", lambda p: sgdgp.plot.posterior(p, grid(), ax="new")),
        (ValueError, "dim: .*found 1", lambda p: sgdgp.plot.slice(p, grid(1), 1)),
        (
            ValueError,
            r"x: .*\(d,\), found \(1, 1\)",
            lambda p: sgdgp.plot.slice(p, grid(1)[:, None], 0),
        ),
        (TypeError, "dim: ", lambda p: sgdgp.plot.slice(p, grid(1), 0.5)),
        (ValueError, "x: ", lambda p: sgdgp.plot.slice(p, grid(2), 0)),
    ],
)
def test_bad_input_is_named_and_no_figure_opened(one, error, says, call):
    before = plt.get_fignums()
    with pytest.raises(error, match=says):
        call(one)
    assert plt.get_fignums() == before


def test_classes_are_sent_to_their_diagram():
    x, y = toy_data(20, 1)
    torch.manual_seed(0)
    network = nn.Linear(1, 2).double().eval()
    fitting = linearise(network, Categorical())
    p = fitting.fit([(x, (y > 0).long())], steps=1, final_samples=2, progress=False)
    with pytest.raises(ValueError, match=r"networks\.reliability"):
        sgdgp.plot.posterior(p, grid())
