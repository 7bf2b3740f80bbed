"""Small networks beside laplace-torch: full, Kronecker and last-layer posteriors.

``python -m benchmarks.networks.laplace_torch --seeds 0 1 2 3 4`` writes
``measured/laplace_torch.json``: for each data set and method the negative log
likelihood of test targets (and the calibration error of classes) of every seed. All
methods of a seed share one network; hyperparameters are from the marginal likelihood.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import torch
from sklearn.datasets import load_diabetes, load_digits, make_moons
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.json_file import write_json
from benchmarks.networks.laplace_baselines import import_laplace
from benchmarks.uci.data import load_split
from sgdgp.metrics import reliability_of
from sgdgp.networks import Categorical, Gaussian, linearise

RESULTS = Path(__file__).parent / "measured" / "laplace_torch.json"
Data: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]
"""Training inputs and targets, test inputs and targets."""

KINDS = {"full": ("all", "full"), "Kronecker": ("all", "kron")}
KINDS["last layer"] = ("last_layer", "full")
OURS = {"sgdgp": "auto", "sgdgp Kronecker": "kronecker"}


def sinusoid(seed: int) -> Data:
    """A sine with a gap in its inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(150, 1, generator=generator) * 1.5
    x[:75] -= 2.0
    x[75:] += 0.5
    x_test = torch.rand(500, 1, generator=generator) * 4 - 2
    both = torch.cat([x, x_test])
    y = (3 * both).sin() + 0.2 * torch.randn(len(both), 1, generator=generator)
    return x, y[:150], x_test, y[150:]


def diabetes(seed: int) -> Data:
    """Nine tenths to train on, standardised."""
    found = load_diabetes()
    x, y = torch.tensor(found.data).float(), torch.tensor(found.target).float()
    return _split(x, y.unsqueeze(1), seed, 0.9)


def digits(seed: int) -> Data:
    """500 digits to train on."""
    found = load_digits()
    x, y = torch.tensor(found.data).float(), torch.tensor(found.target)
    return _split(x, y, seed, 500 / len(y))


def moons(seed: int) -> Data:
    """200 points to train on."""
    x, y = make_moons(700, noise=0.25, random_state=seed)
    return _split(torch.tensor(x).float(), torch.tensor(y), seed, 200 / 700)


def _split(x: Tensor, y: Tensor, seed: int, share: float) -> Data:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[: int(share * len(x))], order[int(share * len(x)) :]
    x = (x - x[train].mean(0)) / x[train].std(0).clamp_min(1e-3)
    if y.is_floating_point():
        y = (y - y[train].mean(0)) / y[train].std(0)
    return x[train], y[train], x[test], y[test]


def _uci(name: str) -> Callable[[int], Data]:
    def load(seed: int) -> Data:
        split = load_split(name, seed, dtype=torch.float32)
        return split.x, split.y[:, None], split.x_test, split.y_test[:, None]

    return load


TASKS: dict[str, Callable[[int], Data]] = {
    "sinusoid": sinusoid,
    "moons": moons,
    "diabetes": diabetes,
    "yacht": _uci("yacht"),
    "digits": digits,
    "energy": _uci("energy"),
    "concrete": _uci("concrete"),
}


def trained(x: Tensor, y: Tensor, seed: int, decay: float) -> nn.Module:
    """One hidden layer, at the minimum of loss and ``decay`` / n times |theta|^2."""
    torch.manual_seed(seed)
    regression = y.is_floating_point()
    hidden, outputs = (50, 1) if regression else (16, int(y.max()) + 1)
    network = nn.Sequential(
        nn.Linear(x.shape[1], hidden), nn.Tanh(), nn.Linear(hidden, outputs)
    )
    optimiser = torch.optim.Adam(
        network.parameters(), 1e-2, weight_decay=2 * decay / len(x)
    )
    loss = nn.functional.mse_loss if regression else nn.functional.cross_entropy
    for _ in range(1000):
        optimiser.zero_grad()
        loss(network(x), y).backward()
        optimiser.step()
    return network.eval()


def scores_of(mean: Tensor, variance: Tensor | None, y: Tensor) -> dict[str, float]:
    """Of a regression's mean and variance, or of class probabilities."""
    if variance is not None:
        terms = (y - mean).square() / variance + (2 * math.pi * variance).log()
        return {"nll": 0.5 * float(terms.mean())}
    confidence, predicted = mean.max(1)
    of_target = mean.gather(1, y.unsqueeze(1)).clamp_min(1e-12)
    error = reliability_of(confidence, predicted == y).error
    return {"nll": -float(of_target.log().mean()), "ece": error}


def theirs(network: nn.Module, data: Data, kind: str) -> dict[str, float]:
    """laplace-torch, with prior precision and noise by its marginal likelihood."""
    x, y, x_test, y_test = data
    regression = y.is_floating_point()
    weights, structure = KINDS[kind]
    fitted = import_laplace().Laplace(
        copy.deepcopy(network),
        "regression" if regression else "classification",
        subset_of_weights=weights,
        hessian_structure=structure,
    )
    fitted.fit(DataLoader(TensorDataset(x, y), batch_size=128))
    if not regression:
        fitted.optimize_prior_precision(method="marglik", pred_type="glm")
        return scores_of(fitted(x_test).detach(), None, y_test)
    logs = torch.zeros(2, requires_grad=True)
    optimiser = torch.optim.Adam([logs], 0.1)
    for _ in range(150):
        optimiser.zero_grad()
        precision, noise = logs.exp()
        (-fitted.log_marginal_likelihood(precision, noise)).backward()
        optimiser.step()
    mean, variance = fitted(x_test)
    variance = variance.flatten(1) + fitted.sigma_noise.detach().square()
    return scores_of(mean.detach(), variance.detach(), y_test)


def ours(network: nn.Module, data: Data, solver: str) -> dict[str, float]:
    """The linearised network with default settings but for the solver."""
    x, y, x_test, y_test = data
    likelihood = Gaussian() if y.is_floating_point() else Categorical()
    posterior = linearise(network, likelihood).fit(
        TensorDataset(x, y), progress=False, seed=0, solver=solver
    )
    found = posterior.predict(x_test)
    if isinstance(found, Tensor):
        return scores_of(found, None, y_test)
    return scores_of(found.mean, found.target_variance, y_test)


def main() -> None:
    """Measure what is not there yet."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks.laplace_torch")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4])
    parser.add_argument("--decay", type=float, default=0.3)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results: Path = options.results
    found = json.loads(results.read_text()) if results.exists() else {}
    for task in options.tasks:
        for seed in options.seeds:
            key = f"{task} {seed}"
            row = found.setdefault(key, {})
            missing = [name for name in (*KINDS, *OURS) if name not in row]
            if not missing:
                continue
            data = TASKS[task](seed)
            network = trained(data[0], data[1], seed, options.decay)
            for name in missing:
                start = time.perf_counter()
                if name in KINDS:
                    row[name] = theirs(network, data, name)
                else:
                    row[name] = ours(network, data, OURS[name])
                row[name]["seconds"] = round(time.perf_counter() - start, 2)
            write_json(results, found)
            print(key, row, flush=True)


if __name__ == "__main__":
    main()
