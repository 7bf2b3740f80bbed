"""The methods' predictions against dense ones, and their scores."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from benchmarks.networks.data import Images, Task, load_task
from benchmarks.networks.eigenbasis import GRID, Eigenbasis, EigenPredictor
from benchmarks.networks.exact import evidence_optimum, fit_exact, linear_optimum
from benchmarks.networks.laplace_baselines import (
    example_jacobians,
    fit_kfac,
    fit_last_layer,
    without_norms,
)
from benchmarks.networks.network import SmallResNet
from benchmarks.networks.ours import ScaledPredictor
from benchmarks.networks.plain import fit_ensemble, fit_network
from benchmarks.networks.prediction import Prediction
from benchmarks.networks.scores import score
from benchmarks.networks.settings import SETTINGS
from benchmarks.networks.train import outputs, trained
from tests.benchmarks.networks_helpers import TINY, write_images


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    folder = tmp_path_factory.mktemp("images")
    write_images(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGDGP_DATA", str(folder))
        patch.setitem(SETTINGS, "mlp", TINY)
        return load_task("mlp", 0, num_rotated=4)


@pytest.fixture(scope="module")
def network(task: Task) -> nn.Module:
    return trained(task)


def _log_prob(prediction: Prediction, y: Tensor) -> float:
    rows = torch.arange(len(y))
    return float(prediction.log_probabilities[rows, y].mean())


def test_the_temperature_lowers_the_loss_on_the_calibration_images(
    task: Task, network: nn.Module
) -> None:
    found = fit_network(network, task.calibration).predict(task.calibration.x)
    plain, warm = found["network"], found["network, temperature"]
    assert _log_prob(warm, task.calibration.y) >= _log_prob(plain, task.calibration.y)


def test_an_ensemble_predicts_the_mean_of_its_members(
    task: Task, network: nn.Module
) -> None:
    members = [network, trained(task, 1)]
    found = fit_ensemble(members).predict(task.test.x)["ensemble"]
    each = torch.stack([outputs(m, task.test.x).softmax(1) for m in members])
    torch.testing.assert_close(found.log_probabilities.exp(), each.mean(0))
    torch.testing.assert_close(found.samples[..., 1].softmax(1), each[1])


def test_jacobians_are_those_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = SmallResNet(1, 3, stem=(3, 2), widths=(2, 3), strides=(1, 2))
    network = network.double().eval()
    x = torch.randn(2, 1, 8, 8, generator=generator, dtype=torch.float64)
    frozen = without_norms(network)
    f, jacobian = example_jacobians(frozen)(x)
    names = [n for n, p in frozen.named_parameters() if p.requires_grad]
    assert not any("norm" in name for name in names)
    torch.testing.assert_close(f, network(x).detach())
    weights = dict(frozen.named_parameters())
    direction = torch.randn(jacobian.shape[2], generator=generator, dtype=torch.float64)
    step = 1e-6
    with torch.no_grad():
        sizes = [weights[n].numel() for n in names]
        for n, part in zip(names, direction.split(sizes), strict=True):
            weights[n] += step * part.view(weights[n].shape)
        moved = (frozen(x) - f) / step
    torch.testing.assert_close(moved, jacobian @ direction, atol=1e-4, rtol=1e-4)


def test_an_eigenbasis_has_the_variances_of_the_dense_covariance() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    jacobian = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)
    curvature = root @ root.mT
    values, vectors = torch.linalg.eigh(curvature)
    posterior = Eigenbasis(lambda x: (x, jacobian @ vectors), values)
    precisions = torch.tensor([0.1, 3.0], dtype=torch.float64)
    found = posterior.variances(jacobian @ vectors, precisions)
    for i, precision in enumerate(precisions):
        covariance = torch.linalg.inv(curvature + precision * torch.eye(5))
        dense = torch.einsum("bcp,pq,bcq->bc", jacobian, covariance, jacobian)
        torch.testing.assert_close(found[..., i], dense)
    predictor = EigenPredictor(posterior, {"a": 0.1}, 20_000, 0)
    f = torch.zeros(3, 2, dtype=torch.float64)
    spread = predictor(f)["a"].samples.square().mean(-1)
    torch.testing.assert_close(spread, found[..., 0], rtol=0.05, atol=0)


def test_the_exact_evidence_is_at_its_fixed_point(
    task: Task, network: nn.Module
) -> None:
    jacobian = example_jacobians(network)(task.train.x)[1].double()
    precision, curvature = evidence_optimum(jacobian, task.train.y)
    start = torch.zeros(jacobian.shape[2], dtype=torch.float64)
    w, again = linear_optimum(jacobian, task.train.y, precision, start)
    torch.testing.assert_close(again, curvature, rtol=1e-2, atol=1e-3)
    dense = torch.linalg.inv(curvature + precision * torch.eye(len(w)))
    gamma = float((dense * curvature).sum())
    assert gamma / float(w.square().sum()) == pytest.approx(precision, rel=5e-3)


def test_the_linear_optimum_has_no_gradient(task: Task, network: nn.Module) -> None:
    jacobian = example_jacobians(network)(task.train.x)[1].double()
    start = torch.zeros(jacobian.shape[2], dtype=torch.float64)
    w, _ = linear_optimum(jacobian, task.train.y, 2.0, start)
    w.requires_grad_()
    loss = nn.functional.cross_entropy(jacobian @ w, task.train.y, reduction="sum")
    (loss + w.square().sum()).backward()
    assert w.grad is not None
    assert float(w.grad.norm()) < 1e-3 * float(w.detach().norm())


def test_a_network_too_large_for_the_exact_posterior_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="found 40410 weights, expected at most 4000"):
        fit_exact(
            task,
            nn.Sequential(nn.Flatten(), nn.Linear(4040, 10)),
            num_samples=2,
            seed=0,
        )


@pytest.mark.parametrize("fit", [fit_last_layer, fit_kfac])
def test_laplace_predictions_are_those_of_laplace_torch(
    task: Task, network: nn.Module, fit: object
) -> None:
    laplace = pytest.importorskip("laplace")
    assert callable(fit)
    fitted = fit(task, network, num_samples=4, seed=0)
    variant = next(name for name in fitted.about if name.endswith("evidence"))
    last = fit is fit_last_layer
    theirs = laplace.Laplace(
        network,
        "classification",
        subset_of_weights="last_layer" if last else "all",
        hessian_structure="full" if last else "kron",
        prior_precision=fitted.about[variant]["precision"],
    )
    theirs.fit(task.train.loader())
    expected = theirs(task.test.x, pred_type="glm", link_approx="probit")
    found = fitted.predict(task.test.x)[variant].log_probabilities.exp()
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
    assert theirs.prior_precision.item() == pytest.approx(
        fitted.about[variant]["precision"]
    )


def test_calibration_takes_the_best_precision_of_the_grid(
    task: Task, network: nn.Module
) -> None:
    jacobians = example_jacobians(network)
    size = jacobians(task.train.x[:1])[1].shape[2]
    posterior = Eigenbasis(jacobians, torch.zeros(size))
    # With every third label wrong the sure network is worse than a doubtful one.
    y = torch.where(torch.arange(20) % 3 > 0, task.calibration.y, task.train.y[:20])
    best = posterior.calibrated_precision(Images(task.calibration.x, y))

    def loss(precision: float) -> float:
        predictor = EigenPredictor(posterior, {"it": precision}, 2, 0)
        return -_log_prob(predictor(task.calibration.x)["it"], y)

    assert loss(best) < min(loss(best / 3), loss(best * 3))
    assert float(GRID[0]) < best < float(GRID[-1])


class _Posterior:
    """Fluctuations that are all of size one."""

    def fluctuations(self, x: Tensor, *, batch_size: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(len(x), 3), torch.ones(len(x), 3, 2)


def test_a_scale_multiplies_variances() -> None:
    predict = ScaledPredictor(_Posterior(), {"none": 0.0, "four": 4.0})  # type: ignore[arg-type]
    found = predict(torch.zeros(5, 1, 1, 1))
    assert float(found["none"].samples.abs().max()) == 0.0
    assert float(found["four"].samples.square().mean()) == 4.0


def test_scores_of_a_certain_network_are_closed_forms(
    task: Task, network: nn.Module
) -> None:
    scores = score(task, fit_network(network, task.calibration))["network"]
    f = outputs(network, task.test.x)
    expected = nn.functional.cross_entropy(f, task.test.y)
    assert scores["nll"] == pytest.approx(float(expected), rel=1e-5)
    assert scores["test_images"] == 30
    assert 0 <= scores["auroc"] <= 1
    assert sum(scores["reliability"]["counts"]) == 30
    assert scores["rotated"]["angle"][-1] == 180
    assert len(scores["rotated"]["nll"]) == 13
    assert all(math.isfinite(value) for value in scores["rotated"]["nll"])


def test_settings_without_digits_have_no_curve(task: Task, network: nn.Module) -> None:
    plain = replace(task, rotated=None)
    assert (
        "rotated" not in score(plain, fit_network(network, task.calibration))["network"]
    )


def test_wrong_labels_have_scores_against_the_right_ones_too(
    task: Task, network: nn.Module
) -> None:
    wrong = (task.test.y + 1) % 10
    noisy = replace(
        task,
        setting=replace(task.setting, wrong_labels=0.5),
        test=Images(task.test.x, wrong),
        clean_y=task.test.y,
    )
    before = score(task, fit_network(network, task.calibration))["network"]
    after = score(noisy, fit_network(network, task.calibration))["network"]
    assert "clean" not in before
    assert after["clean"]["nll"] == before["nll"]
    assert after["clean"]["accuracy"] == before["accuracy"]
    assert after["nll"] > before["nll"]
