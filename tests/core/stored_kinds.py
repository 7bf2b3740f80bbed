"""Every kind of file: how one is written, and how it is used again."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from botorch.models import SingleTaskGP
from gpytorch.kernels import MaternKernel
from sklearn.gaussian_process import kernels
from torch import Tensor, nn

import sgdgp
from sgdgp.bayesopt import maximise, thompson_sampling
from sgdgp.botorch import PathwiseModel
from sgdgp.core.errors import CheckpointError, StorageError
from sgdgp.networks import Categorical, LearnedPrior, linearise
from sgdgp.networks.potential import Potential
from sgdgp.networks.sampling import Draws, hmc
from sgdgp.sklearn import SGDGPRegressor
from sgdgp.tomography import ParallelBeam, Reconstruction, UNet, reconstruct
from tests.models import gp, toy_data

CG = sgdgp.CG(tolerance=1e-6, preconditioner=None)


@dataclass(frozen=True)
class Kind:
    """One kind of file, as its users meet it.

    Attributes:
        write: Puts a file at a path; what it returns is what ``again`` must give.
        again: Uses the file: loads it, or goes on from it.
        words: What the file is called in messages.
        saved: What ``save`` wrote, and ``load`` reads; else a checkpoint.
        loader: The room's own ``load``, for what was saved.
    """

    write: Callable[[Path], dict[str, Any]]
    again: Callable[[Path], dict[str, Any]]
    words: str
    saved: bool
    loader: Callable[[Path], Any] | None = None

    @property
    def door(self) -> Callable[[Path], Any]:
        """Uses the file without a look at its kind first."""
        return self.loader or self.again

    @property
    def error(self) -> type[Exception]:
        """What a file is refused by."""
        return StorageError if self.saved else CheckpointError


def _model(n: int = 20) -> Any:
    return gp(MaternKernel(nu=1.5), n=n, noise=1e-2)


def _predictions(posterior: Any) -> dict[str, Any]:
    x = toy_data(5, seed=1)[0]
    return {"mean": posterior.mean(x), "samples": posterior.samples(x)}


# Posteriors


def _write_posterior(path: Path) -> dict[str, Any]:
    posterior = sgdgp.condition(_model(), num_samples=3, num_features=8, seed=4)
    posterior.save(path)
    return _predictions(posterior)


def _load_posterior(path: Path) -> dict[str, Any]:
    return _predictions(sgdgp.load(path, _model(7)))


def _network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).eval()


def _loader() -> list[tuple[Tensor, Tensor]]:
    x = toy_data(12, dtype=torch.float32)[0]
    return [(x, torch.arange(12) % 2)]


def _fitted(path: Path | None, callback: Any = None) -> Any:
    return linearise(_network(), Categorical()).fit(
        _loader(),
        num_samples=2,
        final_samples=3,
        steps=2,
        checkpoint=path,
        callback=callback,
        progress=False,
    )


def _network_predictions(posterior: Any) -> dict[str, Any]:
    x = toy_data(5, seed=1, dtype=torch.float32)[0]
    return {"predictions": posterior.predict(x), "samples": posterior.samples(x)}


def _write_network(path: Path) -> dict[str, Any]:
    posterior = _fitted(None)
    posterior.save(path)
    return _network_predictions(posterior)


def _load_network(path: Path) -> dict[str, Any]:
    return _network_predictions(sgdgp.load(path, _network()))


def _target(prior: LearnedPrior) -> dict[str, Any]:
    fit = linearise(_network(), Categorical(), prior=prior).fit
    found = fit(_loader(), precision=1.0, steps=0, final_samples=3, progress=False)
    return {**_network_predictions(found), "seen": prior.seen}


def _write_prior(path: Path) -> dict[str, Any]:
    prior = LearnedPrior.from_data(_network(), Categorical(), _loader(), strength=1.0)
    prior.save(path)
    return _target(prior)


def _load_prior(path: Path) -> dict[str, Any]:
    return _target(sgdgp.load(path))


def _drawn(draws: Draws) -> dict[str, Any]:
    return {"weights": draws.weights, "names": draws.names, "seconds": draws.seconds}


def _write_draws(path: Path) -> dict[str, Any]:
    weights = torch.linspace(-1, 1, 12).view(2, 2, 3)
    draws = Draws(weights, ["weight"], [(1, 3)], seconds=0.5)
    draws.save(path)
    return _drawn(draws)


def _load_draws(path: Path) -> dict[str, Any]:
    return _drawn(sgdgp.load(path))


def _reconstructed(path: Path | None, callback: Any = None) -> Reconstruction:
    beam = ParallelBeam(8, 4)
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return reconstruct(
            beam.simulate(torch.ones(8, 8)),
            beam,
            UNet((1,), (0,)),
            iterations=30,
            checkpoint=path,
            callback=callback,
            progress=False,
        )


def _shown(found: Reconstruction) -> dict[str, Any]:
    with torch.no_grad():
        image = found.network(found.input)[0, 0]
    return {
        "image": image,
        "data": found.measurement(image),
        "losses": [entry.loss for entry in found.history],
        "warnings": found.warnings,
    }


def _write_reconstruction(path: Path) -> dict[str, Any]:
    found = _reconstructed(None)
    found.save(path)
    return _shown(found)


def _load_reconstruction(path: Path) -> dict[str, Any]:
    return _shown(sgdgp.load(path))


def _reconstruction(path: Path | None, callback: Any = None) -> dict[str, Any]:
    return _shown(_reconstructed(path, callback))


def _definition() -> SingleTaskGP:
    x, y = toy_data(12)
    return SingleTaskGP(x, y.unsqueeze(1), outcome_transform=None)


def _botorch_predictions(model: PathwiseModel) -> dict[str, Any]:
    x = toy_data(5, seed=1)[0]
    return {"values": model.posterior(x).values}


def _write_botorch(path: Path) -> dict[str, Any]:
    model = PathwiseModel(_definition(), num_samples=3, num_features=8)
    model.save(path)
    return _botorch_predictions(model)


def _load_botorch(path: Path) -> dict[str, Any]:
    return _botorch_predictions(sgdgp.load(path, _definition()))


def _regressed(regressor: SGDGPRegressor) -> dict[str, Any]:
    x = toy_data(5, seed=1)[0]
    mean, std = map(torch.from_numpy, regressor.predict(x.numpy(), return_std=True))
    samples = regressor.posterior_.samples(x)
    return {"mean": mean, "std": std, "samples": samples}


def _write_regressor(path: Path) -> dict[str, Any]:
    x, y = toy_data(12)
    kernel = kernels.RBF([0.5, 2.0]) + kernels.WhiteKernel(0.1)
    model = SGDGPRegressor(kernel, steps=2, num_samples=3, random_state=0)
    model.fit(x.numpy(), y.numpy()).save(path)
    return _regressed(model)


def _load_regressor(path: Path) -> dict[str, Any]:
    return _regressed(sgdgp.load(path))


# Checkpoints: ``write`` stops in the middle and then lets a copy go on to its end


def _stop_after(count: int) -> Callable[[Any], bool]:
    heard: list[Any] = []
    return lambda progress: heard.append(progress) or len(heard) >= count


def _solve(path: Path | None, callback: Any = None) -> dict[str, Any]:
    posterior = sgdgp.condition(
        _model(),
        solver=CG,
        num_samples=2,
        num_features=8,
        checkpoint=path,
        callback=callback,
        progress=False,
    )
    warnings = posterior.solution.warnings
    return {**_predictions(posterior), "warnings": warnings}


def _fit(path: Path | None, callback: Any = None) -> dict[str, Any]:
    model = _model()
    fitted = sgdgp.fit(
        model, steps=4, checkpoint=path, callback=callback, progress=False
    )
    parameters = {k: v.detach() for k, v in model.named_parameters()}
    return {**parameters, "warnings": fitted.warnings}


def _network_fit(path: Path | None, callback: Any = None) -> dict[str, Any]:
    posterior = _fitted(path, callback)
    return {**_network_predictions(posterior), "warnings": posterior.warnings}


def _sampling(path: Path | None, callback: Any = None) -> dict[str, Any]:
    result = thompson_sampling(
        lambda x: -(x - 0.3).square().sum(1),
        torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64),
        6,
        2,
        2,
        model=_model(4),
        num_features=8,
        maximiser=functools.partial(maximise, num_candidates=8, rounds=1, steps=2),
        checkpoint=path,
        callback=callback,
        progress=False,
    )
    return {"x": result.x, "y": result.y}


def _chains(path: Path | None, callback: Any = None) -> dict[str, Any]:
    potential = Potential.from_network(_network(), Categorical(), _loader())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draws = hmc(
            potential,
            chains=2,
            draws=4,
            warmup=4,
            leapfrog=1,
            checkpoint=path,
            callback=callback,
            progress=False,
        )
    return {**_drawn(draws), "warnings": draws.warnings, "seconds": 0.0}


def _checkpoint(run: Callable[..., dict[str, Any]], words: str, stop: int) -> Kind:
    def write(path: Path) -> dict[str, Any]:
        run(path, _stop_after(stop))
        content = path.read_bytes()
        found = run(path)
        path.write_bytes(content)
        return found

    return Kind(write, run, words, saved=False)


KINDS: dict[str, Kind] = {
    "sgdgp.posterior": Kind(
        _write_posterior,
        _load_posterior,
        "posterior",
        True,
        lambda path: sgdgp.posterior.load(path, _model(7)),
    ),
    "sgdgp.networks": Kind(
        _write_network,
        _load_network,
        "posterior of a network",
        True,
        lambda path: sgdgp.networks.load(path, _network()),
    ),
    "sgdgp.networks.prior": Kind(
        _write_prior, _load_prior, "learned prior", True, LearnedPrior.load
    ),
    "sgdgp.networks.draws": Kind(
        _write_draws, _load_draws, "draws of networks", True, Draws.load
    ),
    "sgdgp.tomography": Kind(
        _write_reconstruction,
        _load_reconstruction,
        "reconstruction",
        True,
        Reconstruction.load,
    ),
    "sgdgp.botorch": Kind(
        _write_botorch,
        _load_botorch,
        "PathwiseModel",
        True,
        lambda path: PathwiseModel.load(path, _definition()),
    ),
    "sgdgp.sklearn": Kind(
        _write_regressor, _load_regressor, "regressor", True, SGDGPRegressor.load
    ),
    "sgdgp.checkpoint": _checkpoint(_solve, "checkpoint", 8),
    "sgdgp.fit": _checkpoint(_fit, "checkpoint of a fit", 2),
    "sgdgp.networks.fit": _checkpoint(
        _network_fit, "checkpoint of a network's fit", 12
    ),
    "sgdgp.networks.hmc": _checkpoint(_chains, "checkpoint of a Monte Carlo run", 2),
    "sgdgp.tomography.fit": _checkpoint(
        _reconstruction, "checkpoint of a reconstruction", 2
    ),
    "sgdgp.thompson_sampling": _checkpoint(
        _sampling, "record of a Thompson sampling run", 2
    ),
}
"""By the mark of their files."""
