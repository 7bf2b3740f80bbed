"""What comes out of every place that takes a seed: a few numbers each.

A user who seeds a run finds the same functions, samples and points in another version.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from botorch.models import SingleTaskGP
from botorch.models.transforms import Normalize, Standardize
from botorch.sampling.pathwise import draw_matheron_paths
from gpytorch.kernels import (
    ConstantKernel,
    CosineKernel,
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
from sgdgp.botorch import PathSampler, PathwiseModel, iterative_update
from sgdgp.features import ExactDraws, draw_prior
from sgdgp.kernels import NeuralTangentKernel, TanimotoKernel
from sgdgp.networks import (
    Categorical,
    Gaussian,
    GPrior,
    Isotropic,
    Kronecker,
    Layerwise,
    WeightSGD,
    linearise,
)
from sgdgp.operators import DenseOperator
from sgdgp.sklearn import SGDGPRegressor
from sgdgp.solvers import (
    ADASAP,
    CG,
    SDD,
    SGD,
    AlternatingProjections,
    InducingSGD,
    Nystrom,
    PivotedCholesky,
    RandomOrder,
    Solver,
    TwoLevel,
)
from sgdgp.training import PathwiseProbes, StandardProbes
from tests.golden.models import (
    GP,
    TaskGP,
    bits,
    network_of,
    points,
    standard,
    targets,
    uneven,
    waves,
)

N = 30
BUDGET = 1 << 28
"""Bytes: what is free on a machine must not choose the algorithm."""

SMALL = {"num_features": 16, "memory_budget": BUDGET, "progress": False}


def _generator(seed: int = 11) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Features and prior draws


@dataclass(frozen=True)
class Features:
    """Features of a kernel at some points, and prior draws there."""

    kernel: Callable[[], Kernel]
    x: Callable[[], Tensor] = lambda: points(4, 2, 1)
    dtype: torch.dtype = torch.float64

    def __call__(self) -> dict[str, Any]:
        """Numbers of both, and where the generator is afterwards."""
        kernel, x = self.kernel().to(self.dtype), self.x().to(self.dtype)
        generator = _generator()
        settings = {"dim": x.shape[1], "num_features": 8, "dtype": self.dtype}
        found = sgdgp.random_features(kernel, generator=generator, **settings)
        wave = waves(found.num_features).to(self.dtype).unsqueeze(1)
        draws = draw_prior(kernel, 5, generator=generator, group_size=3, **settings)
        return {
            "features": found.forward(x, wave)[:, 0],
            "draws": draws(x).T,
            "next": torch.rand(2, generator=generator, dtype=torch.float64),
        }


def _with_task() -> Tensor:
    return torch.cat([points(4, 2, 1), torch.tensor([[0.0], [2], [1], [0]])], dim=1)


def _index_product() -> Kernel:
    index = IndexKernel(num_tasks=3, rank=2, active_dims=[2])
    return uneven(RBFKernel(active_dims=[0, 1]) * index)


_FEATURES: dict[str, Features] = {
    "rbf": Features(lambda: uneven(RBFKernel(ard_num_dims=2))),
    "rbf float32": Features(RBFKernel, dtype=torch.float32),
    "matern 1/2": Features(lambda: MaternKernel(0.5)),
    "matern 3/2": Features(lambda: MaternKernel(1.5)),
    "matern 5/2": Features(lambda: uneven(MaternKernel(2.5, ard_num_dims=2))),
    "rational quadratic": Features(lambda: uneven(RQKernel())),
    "periodic": Features(lambda: uneven(PeriodicKernel())),
    "linear": Features(lambda: uneven(LinearKernel())),
    "constant": Features(ConstantKernel),
    "polynomial": Features(lambda: uneven(PolynomialKernel(power=2))),
    "scale": Features(lambda: uneven(ScaleKernel(MaternKernel(1.5)))),
    "sum": Features(lambda: RBFKernel() + ScaleKernel(MaternKernel(0.5))),
    "sum with linear": Features(lambda: RBFKernel() + LinearKernel()),
    "product": Features(lambda: RBFKernel() * MaternKernel(1.5)),
    "product with linear": Features(lambda: RBFKernel() * LinearKernel()),
    "active dims": Features(
        lambda: RBFKernel(active_dims=[1]) + PeriodicKernel(active_dims=[0])
    ),
    "index": Features(
        lambda: uneven(IndexKernel(num_tasks=3, rank=1)),
        lambda: torch.tensor([[0.0], [2.0], [1.0]]),
    ),
    "index product": Features(_index_product, _with_task),
    "tanimoto": Features(TanimotoKernel, lambda: bits(4, seed=1)),
    "scaled tanimoto": Features(
        lambda: uneven(ScaleKernel(TanimotoKernel())), lambda: bits(4, seed=1)
    ),
    "tangent": Features(
        lambda: NeuralTangentKernel(network_of([2, 4, 1], seed=1)),
    ),
}


def _exact_draws() -> dict[str, Any]:
    draws = ExactDraws(
        RBFKernel().double(), 2, points(4), generator=_generator(), max_points=50
    )
    return {"known": draws(points(4)), "new": draws(points(3, 2, 1))}


# Posteriors


def _gp(kernel: Kernel | None = None, n: int = N) -> GP:
    x = points(n)
    return GP(x, targets(x), kernel or MaternKernel(1.5))


def _conditioned(seed: int | torch.Generator, **settings: Any) -> Any:
    return sgdgp.condition(_gp(), seed=seed, **{**SMALL, "num_samples": 3, **settings})


def _posterior(seed: int | torch.Generator, **settings: Any) -> dict[str, Any]:
    posterior = _conditioned(seed, **settings)
    x, new = points(4, 2, 1), points(3, 2, 2)
    updated = posterior.update(new, targets(new), progress=False)
    return {
        "samples": posterior.samples(x),
        "draw": posterior.draw(2, seed=1)(x),
        "draw by default": posterior.draw(1)(x),
        "draw of a generator": posterior.draw(1, seed=_generator(5))(x),
        "updated": updated.samples(x),
        "updated again": updated.update(new + 0.2, targets(new)).samples(x),
        "draw of updated": updated.draw(1, seed=1)(x),
    }


def _passed_generator() -> dict[str, Any]:
    generator = _generator(3)
    found = _posterior(generator)
    rest = torch.rand(2, generator=generator, dtype=torch.float64)
    return {**found, "generator": rest}


def _groups() -> dict[str, Any]:
    posterior = _conditioned(0, num_samples=66)
    return {"samples": posterior.samples(points(2, 2, 1))}


def _outputs(y: Tensor) -> dict[str, Any]:
    posterior = sgdgp.condition(_gp(), points(N), y, num_samples=2, seed=0, **SMALL)
    x, new = points(3, 2, 1), points(2, 2, 2)
    y_new = torch.stack([targets(new), -targets(new)], dim=1)
    updated = posterior.update(new, y_new, progress=False)
    return {
        "samples": posterior.samples(x),
        "draw": posterior.draw(1, seed=1)(x),
        "updated": updated.samples(x),
        "draw of updated": updated.draw(1, seed=1)(x),
    }


def _two_columns() -> Tensor:
    return torch.stack([targets(points(N)), targets(points(N), 1)], dim=1)


def _columns_with_gaps() -> dict[str, Any]:
    y = _two_columns()
    y[2, 1] = y[5, 0] = torch.nan
    return _outputs(y)


def _correlated(kernel: Kernel) -> dict[str, Any]:
    model = TaskGP(points(N), _two_columns(), kernel)
    posterior = sgdgp.condition(model, num_samples=2, seed=0, **SMALL)
    x, new = points(3, 2, 1), points(2, 2, 2)
    y_new = torch.stack([targets(new), -targets(new)], dim=1)
    updated = posterior.update(new, y_new, progress=False)
    return {
        "samples": posterior.samples(x),
        "draw": posterior.draw(1, seed=1)(x),
        "updated": updated.samples(x),
    }


def _of_kernel(kernel: Kernel, d: int = 2) -> dict[str, Any]:
    x = points(N, d)
    model = GP(x, targets(x), kernel)
    posterior = sgdgp.condition(model, num_samples=2, seed=0, **SMALL)
    at = points(4, d, 1)
    return {"samples": posterior.samples(at), "draw": posterior.draw(1, seed=1)(at)}


# Learning


def _fit(**settings: Any) -> dict[str, Any]:
    model = _gp(uneven(ScaleKernel(RBFKernel(ard_num_dims=2))))
    fitted = sgdgp.fit(
        model,
        **{
            "steps": 3,
            "seed": 2,
            "plateau": None,
            "progress": False,
            "memory_budget": BUDGET,
            **settings,
        },
    )
    return {
        "parameters": {k: v.flatten() for k, v in model.named_parameters()},
        "values": [entry.value for entry in fitted.history],
        "passes": fitted.passes,
    }


def _marginal_likelihood(seed: int | torch.Generator) -> dict[str, Any]:
    model = _gp(uneven(ScaleKernel(RBFKernel())))
    model.train()
    mll = sgdgp.StochasticMarginalLogLikelihood(
        model.likelihood,
        model,
        probes=StandardProbes(4),
        solver=CG(tolerance=1e-4, preconditioner=None),
        seed=seed,
        memory_budget=BUDGET,
    )
    (x,) = model.train_inputs
    values = []
    for _ in range(2):
        model.zero_grad()
        value = mll(model(x), model.train_targets)
        value.backward()
        values.append(value.detach())
    return {
        "values": torch.stack(values),
        "gradients": {
            k: v.grad.flatten()
            for k, v in model.named_parameters()
            if v.grad is not None
        },
    }


def _initialised(kind: str) -> dict[str, Any]:
    model = _gp(uneven(ScaleKernel(RBFKernel())), 60)
    sgdgp.initialise(model, subsets=2, size=20, steps=4, kind=kind, seed=3)
    return {k: v.flatten() for k, v in model.named_parameters()}


def _evidence(seed: int | torch.Generator, n: int) -> dict[str, Any]:
    found = sgdgp.log_marginal_likelihood(_gp(n=n), num_probes=3, seed=seed)
    return {"value": found.value, "standard error": found.standard_error}


# Solvers: the order of blocks, sketches and features


@dataclass(frozen=True)
class Order:
    """A solver that is stopped after few passes."""

    solver: Solver
    seed: int | None = 7

    def __call__(self) -> dict[str, Any]:
        """What it has by then."""
        generator = None if self.seed is None else _generator(self.seed)
        solution = self.solver.solve(
            DenseOperator(MaternKernel(1.5).double(), points(80, 3)),
            torch.tensor(0.1, dtype=torch.float64),
            standard((80, 2), seed=1),
            generator=generator,
        )
        return {"weights": solution.weights[:6], "passes": solution.passes}


_SOLVERS: dict[str, Solver] = {
    "sdd": SDD(block_size=10, max_passes=5.0),
    "sgd": SGD(block_size=10, num_features=20, max_passes=5.0),
    "sgd no features": SGD(block_size=10, num_features=0, max_passes=5.0),
    "inducing": InducingSGD(block_size=10, inducing=20, max_passes=5.0),
    "adasap": ADASAP(block_size=10, max_passes=5.0),
    "projections": AlternatingProjections(0.01, 5.0, block_size=10),
    "projections random": AlternatingProjections(
        0.01, 5.0, block_size=10, selection=RandomOrder()
    ),
    "cg": CG(max_passes=4.0, tolerance=1e-9),
    "cg two levels": CG(1e-9, 5.0, preconditioner=TwoLevel(PivotedCholesky(8), 4)),
    "cg pivoted": CG(1e-9, 5.0, preconditioner=PivotedCholesky(8)),
    "cg nystrom": CG(1e-9, 5.0, preconditioner=Nystrom(8)),
}

# Networks


def _network(prior: Any, likelihood: Any, seed: Any = 3, **settings: Any) -> Any:
    x = points(24, 2, 9)
    y = standard((24, 2), seed=10)
    if not isinstance(likelihood, Gaussian):
        y = (2 * waves(24)).long() % 2
    posterior = linearise(
        network_of([2, 4, 2], seed=8), likelihood, prior, memory_budget=BUDGET
    ).fit(
        DataLoader(TensorDataset(x, y), batch_size=12),
        **{
            "num_samples": 2,
            "final_samples": 3,
            "steps": 1,
            "solver": "cg",
            "seed": seed,
            "progress": False,
            **settings,
        },
    )
    return {
        "samples": posterior.samples(points(3, 2, 1)),
        "precisions": posterior.precisions,
    }


# Bayesian optimisation, BoTorch, scikit-learn

_BOX = torch.tensor([[-1.0, -1.0], [1.0, 1.0]], dtype=torch.float64)


def _hill(x: Tensor) -> Tensor:
    return 1.0 - (x - 0.3).square().sum(1)


def _maximised(seed: int | torch.Generator) -> dict[str, Any]:
    posterior = _conditioned(0)
    settings = {"num_candidates": 32, "seed": seed, "memory_budget": BUDGET}
    near = maximise(posterior, _BOX, rounds=2, steps=0, **settings)
    found = maximise(posterior, _BOX, rounds=1, steps=3, **settings)
    anywhere = maximise(posterior.functions, _BOX, rounds=1, steps=0, **settings)
    return {"near": near.x, "found": found.x, "anywhere": anywhere.x}


def _thompson(seed: int, **settings: Any) -> dict[str, Any]:
    result = thompson_sampling(
        _hill,
        _BOX,
        6,
        3,
        2,
        seed=seed,
        maximiser=lambda posterior, bounds, **given: maximise(
            posterior, bounds, 16, rounds=1, steps=2, **given
        ),
        num_features=16,
        memory_budget=BUDGET,
        progress=False,
        **settings,
    )
    return {"x": result.x}


def _definition(outputs: int = 1) -> SingleTaskGP:
    x = points(16)
    y = torch.stack([targets(x), targets(x, 1)][:outputs], dim=1)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        return SingleTaskGP(
            x,
            y,
            input_transform=Normalize(2),
            outcome_transform=Standardize(outputs),
        )


def _botorch(seed: int, outputs: int = 1) -> dict[str, Any]:
    model = PathwiseModel(
        _definition(outputs),
        seed=seed,
        num_samples=3,
        num_features=16,
        memory_budget=BUDGET,
    )
    x = points(2, 2, 1)
    first = model.posterior(x).rsample(torch.Size([2]))
    second = model.posterior(x).rsample(torch.Size([2]))
    sampler = PathSampler(torch.Size([2]), seed=1)
    # More than there are: drawn anew.
    many = model.posterior(x).rsample(torch.Size([5]))
    torch.manual_seed(1)
    noisy = model.posterior(x, observation_noise=True).rsample(torch.Size([2]))
    paths = draw_matheron_paths(model, torch.Size([2]))
    fantasies = model.fantasize(x, PathSampler(torch.Size([2]), seed=0))
    grown = model.condition_on_observations(x, model.posterior(x).mean.detach())
    return {
        "first": first,
        "second": second,
        "sampler": sampler(model.posterior(x)),
        "many": many,
        "noisy": noisy,
        "paths": paths(x),
        "fantasies": fantasies.posterior(points(2, 2, 2)).mean,
        "grown": grown.posterior(x).values,
    }


def _iterative_update(seed: int) -> dict[str, Any]:
    model = _definition().eval()
    torch.manual_seed(2)
    paths = draw_matheron_paths(
        model,
        torch.Size([2]),
        update_strategy=iterative_update(SDD(), seed=seed, memory_budget=BUDGET),
    )
    return {"paths": paths(points(2, 2, 1))}


def _regressor(**settings: Any) -> dict[str, Any]:
    X, y = points(N).numpy(), targets(points(N)).numpy()
    new = points(3, 2, 1).numpy()
    regressor = SGDGPRegressor(
        steps=3, num_samples=4, device="cpu", random_state=5, **settings
    ).fit(X, y)
    mean, deviation = regressor.predict(new, return_std=True)
    found = {
        "mean": mean,
        "deviation": deviation,
        "sample_y": regressor.sample_y(new, 2, random_state=1),
        "sample_y by default": regressor.sample_y(new, 2),
        "sample_y of a state": regressor.sample_y(
            new, 2, random_state=np.random.RandomState(3)
        ),
        "more": regressor.partial_fit(new, y[:3]).sample_y(new, 1, random_state=1),
    }
    return {name: torch.as_tensor(value) for name, value in found.items()}


_PROBES = {"probes": StandardProbes(4), "solver": CG(1e-3, preconditioner=None)}
_PATHS = {**_PROBES, "probes": PathwiseProbes(4, num_features=16)}

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **{f"features {name}": case for name, case in _FEATURES.items()},
    "exact draws": _exact_draws,
    "condition seed 0": lambda: _posterior(0),
    "condition seed 1": lambda: _posterior(1),
    "condition generator": _passed_generator,
    "condition two groups": _groups,
    "condition sdd": lambda: _posterior(0, solver=SDD(block_size=8)),
    "condition float32": lambda: {
        "samples": sgdgp.condition(
            GP(points(N).float(), targets(points(N)).float(), RBFKernel()),
            num_samples=2,
            seed=0,
            **SMALL,
        ).samples(points(3, 2, 1).float())
    },
    "condition columns": lambda: _outputs(_two_columns()),
    "condition columns with gaps": _columns_with_gaps,
    "condition tasks": lambda: _correlated(MultitaskKernel(RBFKernel(), 2, rank=1)),
    "condition coregionalisation": lambda: _correlated(
        LCMKernel([RBFKernel(), MaternKernel(0.5)], 2)
    ),
    "condition tangent outputs": lambda: _correlated(
        NeuralTangentKernel(network_of([2, 4, 2], seed=1))
    ),
    "condition exact draws": lambda: _of_kernel(PiecewisePolynomialKernel(q=2), d=1),
    "condition cosine": lambda: _of_kernel(CosineKernel(), d=1),
    "fit exact": lambda: _fit(restarts=1),
    "fit standard": lambda: _fit(**_PROBES),
    "fit standard seed 9": lambda: _fit(**{**_PROBES, "seed": 9}),
    "fit generator": lambda: _fit(**{**_PROBES, "seed": _generator()}),
    "fit pathwise": lambda: _fit(**_PATHS),
    "fit restarts": lambda: _fit(**_PROBES, restarts=2),
    "fit dual descent": lambda: _fit(
        probes=StandardProbes(3), solver=SDD(block_size=8)
    ),
    "marginal likelihood": lambda: _marginal_likelihood(0),
    "marginal likelihood generator": lambda: _marginal_likelihood(_generator()),
    "initialise neighbourhoods": lambda: _initialised("neighbourhoods"),
    "initialise random": lambda: _initialised("random"),
    "evidence": lambda: _evidence(0, N),
    "evidence generator": lambda: _evidence(_generator(), N),
    "evidence of many": lambda: _evidence(0, 1100),
    **{f"solver {name}": Order(solver) for name, solver in _SOLVERS.items()},
    "solver by default": Order(SDD(block_size=10, max_passes=5.0), None),
    "network isotropic": lambda: _network(Isotropic(), Categorical()),
    "network layerwise": lambda: _network(Layerwise(), Gaussian()),
    "network diagonal": lambda: _network(GPrior(probes=3), Categorical()),
    "network kronecker": lambda: _network(Kronecker(probes=3), Categorical()),
    "network generator": lambda: _network(Isotropic(), Categorical(), _generator()),
    "network sgd": lambda: _network(
        Isotropic(), Gaussian(), solver=WeightSGD(max_passes=6.0)
    ),
    "network dual": lambda: _network(Isotropic(), Categorical(), solver="dual"),
    "maximise seed 0": lambda: _maximised(0),
    "maximise seed 1": lambda: _maximised(1),
    "maximise generator": lambda: _maximised(_generator()),
    "thompson": lambda: _thompson(0, model=_gp(n=4)),
    "thompson seed 1": lambda: _thompson(1, model=_gp(n=4)),
    "thompson redrawn": lambda: _thompson(0, model=_gp(n=4), redraw_every=2),
    "thompson default model": lambda: _thompson(0, refit_every=2),
    "botorch": lambda: _botorch(0),
    "botorch seed 1": lambda: _botorch(1),
    "botorch outputs": lambda: _botorch(0, 2),
    "botorch iterative update": lambda: _iterative_update(0),
    "regressor": _regressor,
    "regressor stochastic": lambda: _regressor(solver="sdd", normalize_y=False),
}
"""Name -> a function that draws."""
