"""A file of every kind that is stored: how it was made, and what is read from it.

Every kind is written once by ``make`` into ``data/files``. A test copies the files of a
kind, reads them with today's code and compares what ``use`` finds in them.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from botorch.models import KroneckerMultiTaskGP, ModelListGP, SingleTaskGP
from botorch.models.transforms import Log, Normalize, Standardize
from gpytorch.kernels import (
    ConstantKernel,
    IndexKernel,
    Kernel,
    LCMKernel,
    LinearKernel,
    MaternKernel,
    MultitaskKernel,
    PeriodicKernel,
    PiecewisePolynomialKernel,
    PolynomialKernel,
    RBFKernel,
    RQKernel,
    ScaleKernel,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import sgdgp
from sgdgp.bayesopt import maximise, thompson_sampling
from sgdgp.botorch import PathwiseModel
from sgdgp.kernels import NeuralTangentKernel, TanimotoKernel
from sgdgp.networks import (
    Categorical,
    Gaussian,
    GPrior,
    Isotropic,
    Kronecker,
    Layerwise,
    WeightCG,
    WeightSGD,
    linearise,
)
from sgdgp.solvers import (
    ADASAP,
    CG,
    SDD,
    SGD,
    AlternatingProjections,
    Auto,
    Cholesky,
    ExactBlocks,
    InducingSGD,
    Nystrom,
    NystromBlocks,
    PivotedCholesky,
    Progress,
    RandomOrder,
    Solver,
    Stage,
    TwoLevel,
)
from sgdgp.training import PathwiseProbes, StandardProbes
from tests.golden.models import (
    GP,
    FixedNoiseGP,
    HadamardGP,
    NetworkGP,
    TaskGP,
    bits,
    network_of,
    points,
    shifted,
    standard,
    targets,
    uneven,
    waves,
)
from tests.golden.trajectories import account_of, checksum, thinned

N = 24
BUDGET = 1 << 28
"""Bytes: what is free on a machine must not choose the algorithm."""

SMALL = {"num_features": 24, "memory_budget": BUDGET, "progress": False}


class _Stopped(BaseException):
    """The process ends here."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        make: Writes a file, or several whose names begin as this one's.
        use: Reads a copy of them; everything that is to stay as it was.
        rtol: Relative tolerance of the comparison.
    """

    make: Callable[[Path], None]
    use: Callable[[Path], dict[str, Any]]
    rtol: float = 1e-9


# Posteriors


def _composed() -> Kernel:
    smooth = ScaleKernel(MaternKernel(2.5, ard_num_dims=2))
    product = ScaleKernel(RBFKernel(active_dims=[1])) * LinearKernel()
    return uneven(smooth + product + PeriodicKernel(active_dims=[0]))


def _families() -> Kernel:
    rough = MaternKernel(0.5) + MaternKernel(1.5) + RQKernel()
    return uneven(rough + PolynomialKernel(power=2) * RBFKernel() + ConstantKernel())


def _gp(kernel: Kernel, n: int = N, d: int = 2, **settings: Any) -> GP:
    x = points(n, d)
    return GP(x, targets(x), kernel, **settings)


def _columns(n: int = N, outputs: int = 2) -> Tensor:
    y = targets(points(n))
    return torch.stack([y, y.square() - 0.5, 0.4 - y][:outputs], dim=1)


def _with_gaps() -> tuple[Tensor, Tensor]:
    y = _columns(outputs=3)
    y[3, 1] = y[7, 1] = torch.nan
    return points(N), y


def _tanimoto() -> GP:
    x = bits(N)
    return GP(x, targets(x[:, :2]), ScaleKernel(TanimotoKernel()))


def _tangent() -> GP:
    return _gp(ScaleKernel(NeuralTangentKernel(network_of([2, 4, 1], seed=1))))


def _hadamard() -> HadamardGP:
    x = points(N)
    i = (torch.arange(N) % 2).unsqueeze(1)
    return HadamardGP(x, i, targets(x) + i[:, 0])


def _index_product() -> GP:
    x = torch.cat([points(N), (torch.arange(N) % 3).double().unsqueeze(1)], dim=1)
    kernel = RBFKernel(active_dims=[0, 1]) * IndexKernel(
        num_tasks=3, rank=2, active_dims=[2]
    )
    return GP(x, targets(x[:, :2]), uneven(kernel))


def _tasks(kernel: Kernel, outputs: int = 2) -> TaskGP:
    return TaskGP(points(N), _columns(outputs=outputs), kernel)


def _botorch_single(log: bool = False) -> SingleTaskGP:
    x = points(16) + 2.0
    return SingleTaskGP(
        x,
        targets(x).exp().unsqueeze(1),
        input_transform=Normalize(2),
        outcome_transform=Log() if log else Standardize(1),
    )


@dataclass(frozen=True)
class Stored:
    """A posterior of a model, saved."""

    model: Callable[[], Any]
    solver: Solver | str = "auto"
    data: Callable[[], tuple[Tensor, Tensor]] | None = None
    inputs: Callable[[int, int], Any] = lambda n, seed: points(n, 2, seed)
    settings: Mapping[str, Any] = field(default_factory=dict)
    noise: float | None = None
    updates: int = 0

    def make(self, path: Path) -> None:
        """Condition and save."""
        posterior = sgdgp.condition(
            self.model(),
            *(() if self.data is None else self.data()),
            solver=self.solver,
            seed=4,
            **{**SMALL, "num_samples": 3, **self.settings},
        )
        for i in range(self.updates):
            posterior = self._updated(posterior, 3 + i)
        posterior.save(path)

    def use(self, path: Path) -> dict[str, Any]:
        """Load, and ask for all that a posterior knows."""
        model = self.model()
        if not isinstance(model, SingleTaskGP):
            # The file gives the parameters.
            shifted(model)
        posterior = sgdgp.load(path, model)
        x = self.inputs(7, 1)
        updated = self._updated(posterior, 2)
        found = {
            "mean": posterior.mean(x),
            "variance": posterior.variance(x, from_samples=True),
            "samples": posterior.samples(x),
            "draw": posterior.draw(2, seed=3)(x),
            "updated mean": updated.mean(x),
            "updated samples": updated.samples(x),
            "updated draw": updated.draw(1)(x),
        }
        if not isinstance(x, tuple):
            found["marginals"] = torch.cat(
                [posterior.variance(part, from_samples=True) for part in x.split(4)]
            )
        solutions = (
            {"solution": posterior.solution, "updated": updated.solution}
            if hasattr(posterior, "solution")
            else {}
        )
        accounts = {name: account_of(one) for name, one in solutions.items()}
        for account in accounts.values():
            # Only in memory.
            del account["carried"]
        return {**found, **accounts}

    def _updated(self, posterior: Any, seed: int) -> Any:
        x = self.inputs(3, seed)
        first = x[0] if isinstance(x, tuple) else x
        y = targets(first[:, :2])
        outputs = posterior.mean(x).shape[1:]
        if outputs:
            y = torch.stack([y, -y, y + 1.0][: outputs[0]], dim=1)
        return posterior.update(x, y.to(first.dtype), noise=self.noise, progress=False)


def _numbered(n: int, seed: int) -> tuple[Tensor, Tensor]:
    return points(n, 2, seed), (torch.arange(n) % 2).unsqueeze(1)


def _with_task(n: int, seed: int) -> Tensor:
    task = (torch.arange(n) % 3).double().unsqueeze(1)
    return torch.cat([points(n, 2, seed), task], dim=1)


def _fixed_noise() -> FixedNoiseGP:
    x = points(N)
    return FixedNoiseGP(x, targets(x), RBFKernel(), 0.05 + 0.1 * waves(N).square())


_POSTERIORS: dict[str, Stored] = {
    "stationary": Stored(lambda: _gp(RBFKernel())),
    "composed": Stored(lambda: _gp(_composed())),
    "families": Stored(lambda: _gp(_families())),
    "two groups of draws": Stored(
        lambda: _gp(RBFKernel()), settings={"num_samples": 70}
    ),
    "index product": Stored(_index_product, inputs=_with_task),
    "hadamard": Stored(_hadamard, inputs=_numbered),
    "tanimoto": Stored(_tanimoto, inputs=lambda n, seed: bits(n, seed=seed)),
    "tangent": Stored(_tangent),
    "exact draws": Stored(
        lambda: _gp(PiecewisePolynomialKernel(q=2), d=1),
        inputs=lambda n, seed: points(n, 1, seed),
    ),
    "network": Stored(lambda: NetworkGP(points(N), targets(points(N)))),
    "fixed noise": Stored(_fixed_noise, noise=0.2),
    "multitask": Stored(lambda: _tasks(MultitaskKernel(RBFKernel(), 2, rank=1))),
    "coregionalisation": Stored(
        lambda: _tasks(LCMKernel([RBFKernel(), MaternKernel(0.5)], 3), 3)
    ),
    "tangent outputs": Stored(
        lambda: _tasks(NeuralTangentKernel(network_of([2, 4, 2], seed=1)))
    ),
    "independent": Stored(
        lambda: _gp(MaternKernel(1.5)), data=lambda: (points(N), _columns())
    ),
    "independent with gaps": Stored(lambda: _gp(MaternKernel(1.5)), data=_with_gaps),
    "botorch": Stored(_botorch_single, inputs=lambda n, s: points(n, 2, s) + 2.0),
    "updated": Stored(
        lambda: _gp(MaternKernel(1.5), 40), CG(tolerance=1e-3), updates=2
    ),
    "updated by dual descent": Stored(
        lambda: _gp(MaternKernel(1.5)), SDD(block_size=6), updates=1
    ),
    **{
        f"solver {name}": Stored(lambda: _gp(MaternKernel(1.5), 18), solver)
        for name, solver in {
            "sdd": SDD(tolerance=0.02, block_size=6, averaging=0.02),
            "sgd": SGD(tolerance=0.4, block_size=6, num_features=0),
            "inducing": InducingSGD(inducing=10, max_passes=10.0),
            "adasap": ADASAP(block_size=8, preconditioner=NystromBlocks(4)),
            "adasap exact": ADASAP(block_size=8, preconditioner=ExactBlocks()),
            "projections": AlternatingProjections(block_size=6),
            "projections random": AlternatingProjections(0.02, selection=RandomOrder()),
            "cg": CG(tolerance=1e-3, preconditioner=None),
            "cg pivoted": CG(preconditioner=PivotedCholesky(5)),
            "cg nystrom": CG(preconditioner=Nystrom(5)),
            "cg two levels": CG(preconditioner=TwoLevel(PivotedCholesky(4), 3)),
            "cholesky": Cholesky(1e-6, factor_dtype=torch.float32),
            "auto": Auto(
                stages=(
                    Stage(AlternatingProjections(block_size=6), 4.0),
                    Stage(CG(preconditioner=None)),
                )
            ),
        }.items()
    },
}


def _single() -> GP:
    x = points(N).float()
    return GP(x, targets(x), ScaleKernel(MaternKernel(1.5, ard_num_dims=2)))


# Version 0.1.0 wrote Refined, which is read as its inner solver: what is solved for
# after that agrees to the tolerance.
_WITH_ANOTHER_SOLVER = {
    "solver refined": Stored(
        lambda: _gp(MaternKernel(1.5), 18), CG(tolerance=1e-5, preconditioner=None)
    ),
}

_POSTERIORS_IN_FLOAT32: dict[str, Stored] = {
    "float32": Stored(_single, inputs=lambda n, seed: points(n, 2, seed).float()),
}

# Checkpoints of a solve


@dataclass(frozen=True)
class Solve:
    """A solve with a checkpoint, finished or stopped after some calls back."""

    model: Callable[[], Any]
    solver: Solver
    stop: int | None = None
    data: Callable[[], tuple[Tensor, Tensor]] | None = None
    inputs: Callable[[int, int], Any] = lambda n, seed: points(n, 2, seed)

    def make(self, path: Path) -> None:
        """Begin, and stop."""
        self._condition(path, [], self.stop)

    def use(self, path: Path) -> dict[str, Any]:
        """Go on to the end; what was done before is not done again."""
        heard: list[float] = []
        posterior = self._condition(path, heard, None)
        x = self.inputs(7, 1)
        solution = getattr(posterior, "solution", None)
        if self.stop is None:
            assert not heard, "the solver ran again"
        return {
            "samples": posterior.samples(x),
            "mean": posterior.mean(x),
            "solution": None if solution is None else account_of(solution),
            "heard": thinned(heard),
        }

    def _condition(self, path: Path, heard: list[float], stop: int | None) -> Any:
        def told(progress: Progress) -> bool:
            heard.append(progress.passes)
            return stop is not None and len(heard) >= stop

        return sgdgp.condition(
            self.model(),
            *(() if self.data is None else self.data()),
            solver=self.solver,
            seed=4,
            num_samples=2,
            callback=told,
            checkpoint=path,
            operator="auto",
            **SMALL,
        )


_LONG_SDD = SDD(tolerance=1e-4, block_size=6)
_LONG_CG = CG(tolerance=1e-8, preconditioner=None)
_SOLVES: dict[str, Solve] = {
    "solve finished": Solve(lambda: _gp(MaternKernel(1.5)), _LONG_SDD),
    "solve interrupted": Solve(lambda: _gp(MaternKernel(1.5)), _LONG_SDD, 5),
    "solve interrupted cg": Solve(lambda: _gp(_composed()), _LONG_CG, 5),
    "solve interrupted auto": Solve(
        lambda: _gp(MaternKernel(1.5)),
        Auto(1e-6, stages=(Stage(CG(preconditioner=None), 4.0), Stage(_LONG_SDD))),
        8,
    ),
    "solve finished tanimoto": Solve(
        _tanimoto, _LONG_CG, None, inputs=lambda n, seed: bits(n, seed=seed)
    ),
    "solve interrupted tanimoto": Solve(
        _tanimoto, _LONG_CG, 5, inputs=lambda n, seed: bits(n, seed=seed)
    ),
    "solve interrupted tangent": Solve(_tangent, SDD(1e-3, block_size=6), 3),
    "solve interrupted tasks": Solve(
        lambda: _tasks(MultitaskKernel(RBFKernel(), 2, rank=1)), _LONG_CG, 5
    ),
    "solve interrupted hadamard": Solve(_hadamard, _LONG_CG, 5, inputs=_numbered),
    "solve interrupted gaps": Solve(
        lambda: _gp(MaternKernel(1.5)), _LONG_CG, 5, data=_with_gaps
    ),
    "solve finished gaps": Solve(
        lambda: _gp(MaternKernel(1.5)), _LONG_CG, None, data=_with_gaps
    ),
    "solve interrupted botorch": Solve(
        _botorch_single, _LONG_CG, 5, inputs=lambda n, seed: points(n, 2, seed) + 2.0
    ),
    "solve interrupted network": Solve(
        lambda: NetworkGP(points(N), targets(points(N))), _LONG_CG, 5
    ),
}

# Checkpoints of a fit


@dataclass(frozen=True)
class Learn:
    """A fit with a checkpoint, stopped after three steps."""

    model: Callable[[], Any]
    settings: Mapping[str, Any]
    stop: int = 3
    steps: int = 6

    def make(self, path: Path) -> None:
        """Begin, and stop."""
        self._fit(self.model(), path, [], self.stop)

    def use(self, path: Path) -> dict[str, Any]:
        """Go on to the last step."""
        heard: list[int] = []
        model = self.model()
        fitted = self._fit(model, path, heard, None)
        assert heard == list(range(self.stop, self.steps))
        return {
            "reason": fitted.reason,
            "steps": fitted.steps,
            "passes": fitted.passes,
            "warnings": fitted.warnings,
            "values": [entry.value for entry in fitted.history],
            "residuals": [entry.residual for entry in fitted.history],
            "history": [dict(entry.parameters) for entry in fitted.history],
            "parameters": {k: v.flatten() for k, v in model.named_parameters()},
        }

    def _fit(self, model: Any, path: Path, heard: list[int], stop: int | None) -> Any:
        def told(entry: sgdgp.training.FitEntry) -> bool:
            heard.append(entry.step)
            return entry.step + 1 == stop

        settings = {"plateau": None, "seed": 2, "memory_budget": BUDGET}
        return sgdgp.fit(
            model,
            steps=self.steps,
            progress=False,
            callback=told,
            checkpoint=path,
            **{**settings, **self.settings},
        )


_LEARNING_CG = CG(tolerance=1e-3, preconditioner=None)
_FITS: dict[str, Learn] = {
    "fit exact": Learn(lambda: _gp(_composed()), {}),
    "fit exact tanimoto": Learn(_tanimoto, {}),
    "fit exact tasks": Learn(
        lambda: _tasks(MultitaskKernel(RBFKernel(), 2, rank=1)), {}
    ),
    "fit standard": Learn(
        lambda: _gp(ScaleKernel(RBFKernel())),
        {"probes": StandardProbes(4), "solver": _LEARNING_CG},
    ),
    "fit pathwise": Learn(
        lambda: _gp(ScaleKernel(MaternKernel(1.5, ard_num_dims=2))),
        {"probes": PathwiseProbes(4, num_features=24), "solver": _LEARNING_CG},
    ),
    "fit dual descent": Learn(
        _tanimoto,
        {"probes": StandardProbes(3), "solver": SDD(block_size=6)},
    ),
    "fit descent": Learn(
        lambda: _gp(ScaleKernel(RBFKernel())),
        {"optimiser": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.5)},
    ),
}

# Posteriors and fits of networks


@dataclass(frozen=True)
class Network:
    """A linearised network, its posterior and the checkpoint of its fit."""

    prior: Any
    likelihood: Any
    solver: Any = field(default_factory=lambda: WeightCG(tolerance=1e-4))
    weights: Any = None
    stop: int | None = None
    calibrated: bool = False
    memory_budget: int = BUDGET

    @property
    def network(self) -> torch.nn.Sequential:
        """Two inputs, three outputs."""
        return network_of([2, 4, 3], seed=5)

    def fitted(self, heard: list[float], stop: int | None, path: Path | None) -> Any:
        """The posterior of a fit."""

        def told(progress: Progress) -> bool:
            heard.append(progress.passes)
            return stop is not None and len(heard) >= stop

        return linearise(
            self.network,
            self.likelihood,
            self.prior,
            weights=self.weights,
            memory_budget=self.memory_budget,
        ).fit(
            self._loader(30),
            num_samples=3,
            final_samples=4,
            steps=2,
            solver=self.solver,
            seed=3,
            progress=False,
            callback=told,
            checkpoint=path,
        )

    def _loader(self, n: int, seed: int = 0) -> DataLoader:
        x = points(n, 2, seed)
        y = standard((n, 3), seed=10 + seed)
        if not isinstance(self.likelihood, Gaussian):
            y = (3 * waves(n)).long() % 3
        return DataLoader(TensorDataset(x, y), batch_size=12)

    def make(self, path: Path) -> None:
        """Save the posterior."""
        posterior = self.fitted([], None, None)
        if self.calibrated:
            found = posterior.calibrate(self._loader(20, seed=1))
            posterior = replace(posterior, scale=found.scale)
        posterior.save(path)

    def use(self, path: Path) -> dict[str, Any]:
        """Load it and predict."""
        return self._account(sgdgp.networks.load(path, self.network))

    def _account(self, posterior: Any) -> dict[str, Any]:
        x = points(5, 2, seed=1)
        predicted = posterior.predict(x)
        if isinstance(self.likelihood, Gaussian):
            predicted = [predicted.mean, predicted.variance, predicted.noise]
        return {
            "predicted": predicted,
            "samples": posterior.samples(x),
            "linear mean": posterior.linear_mean(x),
            "weights": checksum(posterior.weight_samples),
            "precisions": posterior.precisions,
            "noise": posterior.noise,
            "reason": posterior.reason,
            "passes": posterior.passes,
            "scale": posterior.scale,
            "num_examples": posterior.num_examples,
            "warnings": posterior.warnings,
            "history": [
                [step.precisions, step.effective_dimension, step.loss, step.passes]
                for step in posterior.history
            ],
        }


@dataclass(frozen=True)
class NetworkCheckpoint:
    """A fit of a network that was stopped while it learned or drew its samples."""

    network: Network

    def make(self, path: Path) -> None:
        """Begin, and stop."""
        assert self.network.stop is not None
        self.network.fitted([], self.network.stop, path)

    def use(self, path: Path) -> dict[str, Any]:
        """Go on to the end."""
        heard: list[float] = []
        posterior = self.network.fitted(heard, None, path)
        return {**self.network._account(posterior), "heard": thinned(heard)}


_NETWORKS: dict[str, Network] = {
    "network isotropic": Network(Isotropic(), Categorical()),
    "network layerwise": Network(Layerwise(), Gaussian(per_output=True)),
    "network diagonal": Network(GPrior(probes=4), Categorical()),
    "network diagonal by layer": Network(
        GPrior(probes=4, layerwise=True), Gaussian(noise=0.3)
    ),
    "network kronecker": Network(Kronecker(probes=4), Categorical()),
    "network kronecker gaussian": Network(Kronecker(probes=4), Gaussian()),
    "network isotropic gaussian": Network(Isotropic(), Gaussian()),
    "network last layer": Network(Isotropic(), Categorical(), weights="last_layer"),
    "network calibrated": Network(GPrior(probes=4), Categorical(), calibrated=True),
}
_NETWORK_FITS: dict[str, NetworkCheckpoint] = {
    "network fit learning": NetworkCheckpoint(
        Network(GPrior(probes=4), Categorical(), stop=20)
    ),
    "network fit drawing": NetworkCheckpoint(Network(Isotropic(), Gaussian(), stop=34)),
    # Two samples at a time: some are final.
    "network fit half drawn": NetworkCheckpoint(
        Network(Isotropic(), Gaussian(), stop=38, memory_budget=6000)
    ),
    "network fit kronecker": NetworkCheckpoint(
        Network(Kronecker(probes=4), Categorical(), stop=20)
    ),
    "network fit layerwise": NetworkCheckpoint(
        Network(Layerwise(), Gaussian(per_output=True), WeightSGD(0.05), stop=25)
    ),
}

# Models of BoTorch


def _batched() -> SingleTaskGP:
    x = points(16) + 2.0
    return SingleTaskGP(
        x,
        torch.stack([targets(x).exp(), targets(x, 1)], dim=1),
        input_transform=Normalize(2),
        outcome_transform=Standardize(2),
    )


def _correlated() -> KroneckerMultiTaskGP:
    x = points(16)
    y = torch.stack([targets(x), targets(x, 1)], dim=1)
    return KroneckerMultiTaskGP(x, y, outcome_transform=Standardize(2))


@dataclass(frozen=True)
class BoTorch:
    """A model of BoTorch, saved after some functions were given out."""

    definition: Callable[[], Any]
    updated: bool = False

    def make(self, path: Path) -> None:
        """Condition and save."""
        with _global_seed():
            model = PathwiseModel(
                self.definition(),
                num_samples=4,
                num_features=16,
                seed=3,
                memory_budget=BUDGET,
            )
        x = points(4, 2, 7) + 2.0
        if self.updated:
            model = model.condition_on_observations(x, self._values(model, x))
        model.posterior(x).rsample(torch.Size([2]))
        model.save(path)

    def use(self, path: Path) -> dict[str, Any]:
        """Load it, predict, draw, condition."""
        with _global_seed():
            model = PathwiseModel.load(path, self.definition())
        x, new = points(3, 2, 1) + 2.0, points(2, 2, 2) + 2.0
        posterior = model.posterior(x)
        grown = model.condition_on_observations(new, self._values(model, new))
        return {
            "mean": posterior.mean,
            "variance": posterior.variance,
            "values": posterior.values,
            "rsample": model.posterior(x).rsample(torch.Size([3])),
            "grown mean": grown.posterior(x).mean,
            "grown values": grown.posterior(x).values,
        }

    def _values(self, model: PathwiseModel, x: Tensor) -> Tensor:
        y = [targets(x).exp(), targets(x, 1)]
        return torch.stack(y[: model.num_outputs], dim=1)


@contextlib.contextmanager
def _global_seed() -> Any:
    """Definitions of BoTorch may start at random parameters."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        yield


_BOTORCH: dict[str, BoTorch] = {
    "botorch model": BoTorch(_botorch_single),
    "botorch model of logarithms": BoTorch(lambda: _botorch_single(log=True)),
    "botorch model updated": BoTorch(_botorch_single, updated=True),
    "botorch model of two outputs": BoTorch(_batched),
    "botorch model list": BoTorch(
        lambda: ModelListGP(_botorch_single(), _botorch_single(log=True))
    ),
    "botorch model of correlated outputs": BoTorch(_correlated),
}

# Thompson sampling

_BOX = torch.tensor([[-1.0, 0.0], [1.0, 4.0]], dtype=torch.float64)


def _hill(x: Tensor) -> Tensor:
    top = torch.tensor([0.3, 2.6], dtype=x.dtype)
    width = torch.tensor([1.0, 2.0], dtype=x.dtype)
    return 3.0 - (2.0 * (x - top) / width).square().sum(1)


def _hill_model() -> GP:
    x = points(4)
    kernel = ScaleKernel(MaternKernel(nu=2.5))
    return GP(x, _hill(x), kernel, noise=1e-2)


@dataclass(frozen=True)
class Thompson:
    """A run of Thompson sampling that was stopped after a step, or within one."""

    settings: Mapping[str, Any]
    stop_step: int | None = None
    stop_call: int | None = None
    steps: int = 4

    def make(self, path: Path) -> None:
        """Begin, and stop."""
        with contextlib.suppress(_Stopped):
            self._run(path, [], self.stop_step, self.stop_call)

    def use(self, path: Path) -> dict[str, Any]:
        """Go on to the last step."""
        asked: list[Tensor] = []
        result = self._run(path, asked, None, None)
        x = points(5)
        return {
            "x": result.x,
            "y": result.y,
            "asked": [len(part) for part in asked],
            "reason": result.reason,
            "history": [
                [
                    step.step,
                    step.num_observations,
                    step.best_y,
                    step.passes,
                    step.solver,
                    step.reason,
                ]
                for step in result.history
            ],
            "mean": result.posterior.mean(x),
            "samples": result.posterior.samples(x),
        }

    def _run(
        self,
        path: Path,
        asked: list[Tensor],
        stop_step: int | None,
        stop_call: int | None,
    ) -> Any:
        def objective(x: Tensor) -> Tensor:
            asked.append(x)
            if len(asked) == stop_call:
                raise _Stopped
            return _hill(x)

        return thompson_sampling(
            objective,
            _BOX,
            8,
            self.steps,
            3,
            maximiser=functools.partial(maximise, num_candidates=16, rounds=1, steps=4),
            num_features=24,
            memory_budget=BUDGET,
            progress=False,
            checkpoint=path,
            seed=1,
            callback=lambda step: step.step == stop_step,
            **{"model": _hill_model(), **self.settings},
        )


_THOMPSON: dict[str, Thompson] = {
    "thompson": Thompson({}, stop_step=2),
    "thompson within a step": Thompson({"evaluate_at_once": 2}, stop_call=8),
    "thompson default model": Thompson({"model": None, "refit_every": 3}, stop_step=2),
    "thompson redrawn": Thompson({"redraw_every": 1}, stop_step=2),
    # What the solves leave behind is in a file beside the posterior: a preconditioner
    # of two levels, one of low rank, rows that were appended, directions alone.
    "thompson two levels": Thompson({"solver": CG(1e-3)}, stop_step=2),
    "thompson low rank": Thompson(
        {"solver": CG(1e-3, preconditioner=PivotedCholesky(4))}, stop_step=2
    ),
    "thompson appended": Thompson(
        {"solver": CG(1e-3, preconditioner=TwoLevel(PivotedCholesky(4), 3))},
        stop_step=6,
        steps=8,
    ),
    "thompson directions": Thompson(
        {"solver": CG(1e-3, preconditioner=None)}, stop_step=2
    ),
}

KINDS: dict[str, Kind] = {
    name: Kind(one.make, one.use, rtol)
    for kinds, rtol in (
        (_POSTERIORS, 1e-9),
        (_POSTERIORS_IN_FLOAT32, 1e-5),
        (_WITH_ANOTHER_SOLVER, 1e-5),
        (_SOLVES, 1e-9),
        (_FITS, 1e-9),
        (_NETWORKS, 1e-9),
        (_NETWORK_FITS, 1e-9),
        (_BOTORCH, 1e-9),
        (_THOMPSON, 1e-9),
    )
    for name, one in kinds.items()
}
"""Name -> how its files are made and used."""


def file_of(name: str) -> str:
    """Name of the first file of a kind; others begin so."""
    return f"{name.replace(' ', '_')}.safetensors"
