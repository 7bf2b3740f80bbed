"""Solves whose whole course is recorded: history, reason, settings, weights.

Every case is small, in float64, and independent of the memory of the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpytorch.kernels import (
    LinearKernel,
    MaternKernel,
    MultitaskKernel,
    RBFKernel,
    ScaleKernel,
)
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import sgdgp
from sgdgp.kernels import NeuralTangentKernel
from sgdgp.networks import (
    Categorical,
    Dual,
    Gaussian,
    GPrior,
    Isotropic,
    WeightCG,
    WeightSGD,
    linearise,
)
from sgdgp.operators import KernelOperator, operator_by_name
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
    Solution,
    Solver,
    Stage,
    TwoLevel,
)
from tests.golden.models import GP, network_of, points, standard, waves

N, M = 200, 120
BUDGET = 1 << 30
"""Bytes: what is free on a machine must not choose the algorithm."""


@dataclass(frozen=True)
class System:
    """K over random points, noise variances, right-hand sides, a starting point."""

    operator: KernelOperator
    noise: Tensor | float
    rhs: Tensor
    initial: Tensor
    noise_draws: Tensor


def system_of(name: str) -> System:
    """The system of one name: a kernel, an operator, noise and three columns."""
    x = points(N, 3)
    rhs = standard((N, 3), seed=1)
    kernel, noise, operator = MaternKernel(1.5), 0.05, "dense"
    if name == "small_noise":
        kernel, noise = RBFKernel(), 1e-3
    elif name == "noisy":
        # Conjugate gradients end before rounding has grown to the size of residuals.
        noise = 1.0
    elif name == "rows":
        noise = 0.02 + 0.1 * waves(N).square()
    elif name == "columns":
        # Done at once, soon, and late.
        rhs = torch.stack([0 * waves(N), x.sum(1).sin(), rhs[:, 2]], dim=1)
    elif name == "tiled":
        kernel, operator = ScaleKernel(MaternKernel(2.5, ard_num_dims=3)), "tiled"
    elif name == "linear":
        kernel, noise, operator = LinearKernel(), 0.5, "features"
    elif name == "tangent":
        x, rhs = x[:M], rhs[:M]
        network = network_of([3, 6, 1], seed=3)
        kernel, noise, operator = NeuralTangentKernel(network), 2.0, "features"
    elif name == "tasks":
        kernel = MultitaskKernel(RBFKernel(), 2, rank=1)
        x = x[: N // 2]
        with torch.no_grad():
            kernel.task_covar_module.covar_factor.copy_(torch.tensor([[0.8], [-0.3]]))
            kernel.task_covar_module.raw_var.fill_(0.4)
    elif name != "matern":
        raise ValueError(name)
    built = operator_by_name(operator, kernel.double(), x, memory_budget=BUDGET)
    n = len(rhs)
    draws = torch.as_tensor(noise).sqrt() * standard((3, n), seed=2)
    start = 0.3 * standard((n, 3), seed=4)
    if isinstance(noise, float):
        noise = torch.tensor(noise, dtype=torch.float64)
    return System(built, noise, rhs, start, draws.T.contiguous())


@dataclass(frozen=True)
class Case:
    """A solver on a system, and what else it is given."""

    solver: Solver
    system: str = "matern"
    initial: bool = False
    noise_draws: bool = False
    stop: int | None = None

    def __call__(self) -> dict[str, Any]:
        """Everything that is recorded of the solve."""
        system = system_of(self.system)
        heard: list[float] = []

        def stop(progress: Progress) -> bool:
            heard.append(progress.passes)
            return self.stop is not None and len(heard) >= self.stop

        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            solution = self.solver.solve(
                system.operator,
                system.noise,
                system.rhs,
                initial=system.initial if self.initial else None,
                noise_draws=system.noise_draws if self.noise_draws else None,
                generator=torch.Generator().manual_seed(5),
                callback=stop,
            )
        return {
            **account_of(solution),
            "heard": [len(heard), max(heard, default=0.0)],
            "said": _sentences(said),
        }


def account_of(solution: Solution) -> dict[str, Any]:
    """A solution in numbers: no seconds, weights as a few sums."""
    carried = solution.recycled
    return {
        "solver": solution.solver,
        "reason": solution.reason,
        "passes": solution.passes,
        "residuals": solution.residuals,
        "history": thinned(
            [(e.passes, e.exact, e.residuals) for e in solution.history]
        ),
        "warnings": solution.warnings,
        "settings": _plain(solution.settings),
        "carried": None if carried is None else checksum(carried.residual),
        "weights": checksum(solution.weights),
    }


def thinned(history: Sequence[Any]) -> dict[str, Any]:
    """How long a history is, its beginning and end, and every tenth of the rest."""
    last = len(history)
    kept = [i for i in range(last) if i < 6 or i >= last - 4 or i % 10 == 0]
    return {"length": last, "entries": [history[i] for i in kept]}


def checksum(weights: Tensor) -> dict[str, Tensor]:
    """Norm of every column, and its product with a fixed wave."""
    found = weights.detach().double().reshape(len(weights), -1)
    return {"norms": found.norm(dim=0), "products": waves(len(found)) @ found}


def _plain(value: Any) -> Any:
    """Numbers and names; how a solver prints itself is not part of its course."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items() if _is_plain(item)}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value if _is_plain(item)]
    return value


def _is_plain(value: Any) -> bool:
    if isinstance(value, str):
        return "(" not in value
    return isinstance(value, bool | int | float | None | list | tuple | Mapping)


def _sentences(said: list[warnings.WarningMessage]) -> list[str]:
    return [str(one.message) for one in said if one.category is UserWarning]


FEW = 6.0
"""Passes of a small budget."""

_SOLVERS: dict[str, Case] = {
    # Stochastic dual descent.
    "sdd": Case(SDD(tolerance=1e-3)),
    "sdd few": Case(SDD(max_passes=FEW)),
    "sdd tiny": Case(SDD(max_passes=1.0)),
    "sdd small blocks": Case(SDD(block_size=16, max_passes=30.0)),
    "sdd no momentum": Case(SDD(block_size=20, momentum=0.0, tolerance=0.05)),
    "sdd fixed momentum": Case(SDD(momentum=0.9, averaging=0.1)),
    "sdd restarts": Case(SDD(block_size=20, step_size=2.0, tolerance=0.05)),
    "sdd interrupted": Case(SDD(block_size=20, tolerance=1e-4), stop=4),
    "sdd warm": Case(SDD(), initial=True),
    "sdd columns": Case(SDD(tolerance=1e-3), "columns"),
    "sdd rows": Case(SDD(), "rows"),
    "sdd tiled": Case(SDD(), "tiled"),
    "sdd small noise": Case(SDD(max_passes=40.0), "small_noise"),
    "sdd linear": Case(SDD(block_size=20), "linear"),
    "sdd tangent": Case(SDD(block_size=40), "tangent"),
    "sdd tangent warm": Case(SDD(0.05, block_size=40), "tangent", initial=True),
    "sdd tasks": Case(SDD(), "tasks"),
    "sdd beyond rescue": Case(SDD(step_size=1e30)),
    # Primal stochastic gradient descent.
    "sgd": Case(SGD(tolerance=0.2), noise_draws=True),
    "sgd few": Case(SGD(max_passes=FEW)),
    "sgd tiny": Case(SGD(max_passes=1.5)),
    "sgd no features": Case(SGD(num_features=0, tolerance=0.1)),
    "sgd no features few": Case(SGD(num_features=0, max_passes=FEW, block_size=25)),
    "sgd momentum": Case(SGD(num_features=20, momentum=0.8, max_passes=20.0)),
    "sgd restarts": Case(SGD(num_features=0, step_size=1.0, max_passes=40.0)),
    "sgd interrupted": Case(SGD(num_features=0, tolerance=1e-3), stop=3),
    "sgd warm": Case(SGD(tolerance=0.2), initial=True),
    "sgd columns": Case(SGD(num_features=0, tolerance=0.1), "columns"),
    "sgd rows": Case(SGD(tolerance=0.3), "rows", noise_draws=True),
    "sgd linear": Case(SGD(block_size=20), "linear"),
    "sgd tangent": Case(SGD(tolerance=0.3, block_size=40), "tangent"),
    "sgd tangent few": Case(SGD(block_size=20, max_passes=FEW), "tangent"),
    "sgd tangent warm": Case(SGD(0.6, block_size=40), "tangent", initial=True),
    "sgd tangent restarts": Case(
        SGD(block_size=40, step_size=0.01, max_passes=25.0), "tangent"
    ),
    "sgd tasks": Case(SGD(num_features=0, max_passes=20.0), "tasks"),
    "sgd beyond rescue": Case(SGD(step_size=1e30, max_passes=12.0), initial=True),
    "sgd linear interrupted": Case(SGD(1e-6, block_size=20), "linear", stop=5),
    # Primal stochastic gradient descent with inducing points.
    "inducing": Case(InducingSGD(inducing=40, gradient_tolerance=0.02)),
    "inducing few": Case(InducingSGD(inducing=40, max_passes=FEW)),
    "inducing all": Case(InducingSGD(tolerance=0.3, max_passes=300.0)),
    "inducing rows": Case(
        InducingSGD(inducing=torch.arange(0, N, 4), max_passes=20.0), "rows"
    ),
    "inducing draws": Case(InducingSGD(inducing=50, max_passes=20.0), noise_draws=True),
    "inducing warm": Case(InducingSGD(inducing=50, max_passes=20.0), initial=True),
    "inducing restarts": Case(
        InducingSGD(inducing=50, step_size=2e-3, max_passes=30.0)
    ),
    "inducing interrupted": Case(InducingSGD(inducing=50), stop=2),
    "inducing tiny": Case(InducingSGD(inducing=50, max_passes=0.5)),
    "inducing tasks": Case(InducingSGD(inducing=50, max_passes=8.0), "tasks"),
    "inducing linear": Case(
        InducingSGD(inducing=50, max_passes=8.0), "linear", initial=True
    ),
    # Accelerated sketch-and-project.
    "adasap nystrom": Case(ADASAP(preconditioner=NystromBlocks(30), tolerance=1e-4)),
    "adasap exact": Case(ADASAP(preconditioner=ExactBlocks(), tolerance=1e-4)),
    "adasap few": Case(ADASAP(max_passes=FEW, block_size=20)),
    "adasap tiny": Case(ADASAP(max_passes=1.0)),
    "adasap averaging": Case(ADASAP(averaging=0.5, block_size=20, max_passes=30.0)),
    "adasap mu": Case(ADASAP(mu=0.01, nu=20.0, block_size=20, max_passes=40.0)),
    "adasap warm": Case(ADASAP(block_size=20), initial=True),
    "adasap interrupted": Case(ADASAP(block_size=20, tolerance=1e-5), stop=3),
    "adasap columns": Case(ADASAP(block_size=20), "columns"),
    "adasap rows": Case(ADASAP(block_size=20), "rows"),
    "adasap tiled": Case(ADASAP(block_size=20), "tiled"),
    "adasap tangent": Case(ADASAP(block_size=20), "tangent"),
    "adasap tasks": Case(ADASAP(), "tasks"),
    "adasap linear": Case(ADASAP(block_size=20), "linear"),
    "adasap restarts": Case(
        ADASAP(preconditioner=ExactBlocks(), nu=1.0, mu=1e-8, block_size=50),
        "small_noise",
    ),
    # Alternating projections.
    "projections": Case(AlternatingProjections(block_size=20, tolerance=1e-3)),
    "projections few": Case(AlternatingProjections(block_size=20, max_passes=FEW)),
    "projections tiny": Case(AlternatingProjections(max_passes=1.0)),
    "projections default": Case(AlternatingProjections()),
    "projections random": Case(
        AlternatingProjections(block_size=20, selection=RandomOrder())
    ),
    "projections warm": Case(AlternatingProjections(block_size=20), initial=True),
    "projections interrupted": Case(
        AlternatingProjections(block_size=20, tolerance=1e-4), stop=3
    ),
    "projections columns": Case(AlternatingProjections(block_size=20), "columns"),
    "projections rows": Case(AlternatingProjections(block_size=20), "rows"),
    "projections tiled": Case(AlternatingProjections(block_size=20), "tiled"),
    "projections linear": Case(AlternatingProjections(block_size=20), "linear"),
    "projections tangent": Case(
        AlternatingProjections(0.2, block_size=40), "tangent", initial=True
    ),
    "projections tasks": Case(
        AlternatingProjections(block_size=21), "tasks", initial=True
    ),
    # Conjugate gradients.
    "cg": Case(CG(tolerance=1e-6)),
    "cg few": Case(CG(max_passes=FEW, tolerance=1e-8)),
    "cg tiny": Case(CG(max_passes=1.0)),
    "cg plain": Case(CG(preconditioner=None, tolerance=1e-3), "noisy"),
    "cg plain few": Case(CG(preconditioner=None, max_passes=FEW, tolerance=1e-4)),
    "cg two levels": Case(
        CG(preconditioner=TwoLevel(PivotedCholesky(20), 8), tolerance=1e-4),
        "matern",
    ),
    "cg pivoted": Case(CG(1e-4, preconditioner=PivotedCholesky(25)), "noisy"),
    "cg nystrom": Case(CG(1e-4, preconditioner=Nystrom(25)), "noisy"),
    "cg warm": Case(CG(tolerance=1e-4), initial=True),
    "cg interrupted": Case(CG(preconditioner=None, tolerance=1e-6), stop=4),
    "cg columns": Case(CG(preconditioner=None, tolerance=0.2), "columns"),
    "cg rows": Case(CG(tolerance=1e-5), "rows"),
    "cg tiled": Case(CG(tolerance=1e-5), "tiled"),
    "cg recycling": Case(
        CG(1e-4, preconditioner=PivotedCholesky(20), recycle=20), "noisy"
    ),
    "cg linear": Case(CG(tolerance=1e-6), "linear"),
    "cg tangent": Case(CG(tolerance=1e-5), "tangent"),
    "cg tasks": Case(CG(tolerance=1e-4), "tasks"),
    # Cholesky factors and refinement.
    "cholesky": Case(Cholesky()),
    "cholesky float32": Case(Cholesky(1e-6, factor_dtype=torch.float32)),
    "cholesky one refinement": Case(
        Cholesky(1e-9, max_refinements=1, factor_dtype=torch.float32)
    ),
    "cholesky warm": Case(Cholesky(), initial=True),
    "cholesky rows": Case(Cholesky(), "rows"),
    "cholesky tiled": Case(Cholesky(), "tiled"),
    "cholesky tangent": Case(Cholesky(), "tangent"),
    "cholesky interrupted": Case(Cholesky(1e-9, factor_dtype=torch.float32), stop=1),
    # Plans.
    "auto": Case(Auto(memory_budget=BUDGET)),
    "auto little memory": Case(Auto(memory_budget=200_000), "noisy"),
    "auto least memory": Case(Auto(memory_budget=1_000, max_passes=12.0), "noisy"),
    "auto tasks": Case(Auto(0.2, memory_budget=200_000), "tasks"),
    "auto tangent": Case(Auto(memory_budget=200_000), "tangent"),
    "auto cg then sdd": Case(
        Auto(stages=(Stage(CG(preconditioner=None), 5.0), Stage(SDD())))
    ),
    "auto sdd then cg": Case(
        Auto(stages=(Stage(SDD(), 8.0), Stage(CG(), 30.0), Stage(Cholesky())))
    ),
    "auto three stages": Case(
        Auto(
            tolerance=1e-8,
            stages=(
                Stage(AlternatingProjections(block_size=20), 4.0),
                Stage(ADASAP(block_size=20), 6.0),
                Stage(Cholesky()),
            ),
        ),
        initial=True,
    ),
    "auto few": Case(
        Auto(
            max_passes=9.0,
            stages=(Stage(CG(preconditioner=None), 4.0), Stage(SDD())),
        )
    ),
    "auto interrupted": Case(
        Auto(
            tolerance=1e-6,
            stages=(Stage(CG(preconditioner=None), 4.0), Stage(SDD(block_size=20))),
        ),
        stop=6,
    ),
    "auto recycling": Case(
        Auto(
            recycle=20,
            stages=(Stage(CG(preconditioner=PivotedCholesky(20)), 50.0),),
        ),
        "noisy",
    ),
}


@dataclass(frozen=True)
class Updates:
    """A posterior that is given new data twice, with what every solve leaves behind."""

    solver: Solver
    noise: float = 0.05
    new: int = 6

    def __call__(self) -> dict[str, Any]:
        """The accounts of the first solve and both updates."""
        x, y = points(160, 2), standard((160,), seed=6)
        model = GP(x, x.sum(1).sin() + 0.2 * y, MaternKernel(1.5), noise=self.noise)
        posterior = sgdgp.condition(
            model,
            solver=self.solver,
            num_samples=2,
            num_features=64,
            memory_budget=BUDGET,
            operator="dense",
            progress=False,
        )
        found = {"first": account_of(posterior.solution)}
        for i, name in enumerate(("second", "third")):
            x_new = x[i * self.new : (i + 1) * self.new] + 0.07
            posterior = posterior.update(x_new, x_new.sum(1).sin(), progress=False)
            found[name] = account_of(posterior.solution)
        return found


_UPDATES: dict[str, Updates] = {
    "update sdd": Updates(SDD()),
    "update sgd": Updates(SGD(tolerance=0.3)),
    "update inducing": Updates(InducingSGD(inducing=40, max_passes=20.0)),
    "update sdd many": Updates(SDD(tolerance=1e-4), new=50),
    "update sgd many": Updates(SGD(tolerance=0.2, num_features=0), new=50),
    "update adasap many": Updates(ADASAP(1e-4, block_size=40), new=50),
    "update projections many": Updates(
        AlternatingProjections(1e-3, block_size=20), new=50
    ),
    "update adasap": Updates(ADASAP(block_size=20)),
    "update projections": Updates(AlternatingProjections(block_size=20)),
    "update cg": Updates(CG(tolerance=1e-4)),
    "update cg pivoted": Updates(CG(1e-3, preconditioner=PivotedCholesky(20)), 1.0),
    "update cg plain": Updates(CG(tolerance=1e-3, preconditioner=None), 1.0),
    "update cg many": Updates(CG(tolerance=1e-4), 1e-3, new=50),
    "update cholesky": Updates(Cholesky()),
    "update auto": Updates(Auto(memory_budget=BUDGET)),
    "update auto stages": Updates(
        Auto(stages=(Stage(CG(preconditioner=PivotedCholesky(20)), 40.0),)), 1.0
    ),
}


@dataclass(frozen=True)
class NetworkFit:
    """A fit of a network with one of the solvers of its weights."""

    solver: WeightCG | WeightSGD | Dual
    gaussian: bool = False
    stop: int | None = None

    def __call__(self) -> dict[str, Any]:
        """What the callback hears, and how the fit ends."""
        network = network_of([2, 5, 3], seed=8)
        x = points(40, 2, seed=9)
        y = standard((40, 3), seed=10) if self.gaussian else (3 * waves(40)).long() % 3
        heard: list[Any] = []

        def told(progress: Progress) -> bool:
            heard.append([progress.passes, progress.exact, progress.residuals])
            return self.stop is not None and len(heard) >= self.stop

        posterior = linearise(
            network,
            Gaussian() if self.gaussian else Categorical(),
            Isotropic() if self.gaussian else GPrior(probes=4),
            memory_budget=BUDGET,
        ).fit(
            DataLoader(TensorDataset(x, y), batch_size=20),
            num_samples=3,
            final_samples=4,
            steps=2,
            solver=self.solver,
            seed=3,
            progress=False,
            callback=told,
        )
        return {
            "reason": posterior.reason,
            "passes": posterior.passes,
            "warnings": posterior.warnings,
            "heard": thinned(heard),
            "history": [
                [
                    step.precisions,
                    step.effective_dimension,
                    step.noise,
                    step.loss,
                    step.errors,
                    step.passes,
                ]
                for step in posterior.history
            ],
            "samples": checksum(posterior.weight_samples),
            "mean": checksum(posterior.weight_mean),
        }


_NETWORKS: dict[str, NetworkFit] = {
    "network cg": NetworkFit(WeightCG(tolerance=1e-3)),
    "network cg few": NetworkFit(WeightCG(tolerance=1e-9, max_passes=FEW)),
    "network cg interrupted": NetworkFit(WeightCG(tolerance=1e-3), stop=12),
    "network cg gaussian": NetworkFit(WeightCG(tolerance=1e-3), gaussian=True),
    "network sgd": NetworkFit(WeightSGD(tolerance=0.05)),
    "network sgd few": NetworkFit(WeightSGD(tolerance=1e-6, max_passes=FEW)),
    "network sgd restarts": NetworkFit(WeightSGD(step_size=5.0, max_passes=20.0)),
    "network dual": NetworkFit(Dual(SDD(block_size=60), tolerance=1e-2)),
    "network dual few": NetworkFit(Dual(SDD(block_size=60), max_passes=FEW)),
    "network dual cg": NetworkFit(Dual(CG(preconditioner=None), tolerance=1e-2)),
    "network dual cholesky": NetworkFit(Dual(Cholesky(), tolerance=1e-2)),
}

CASES: dict[str, Callable[[], dict[str, Any]]] = {
    **_SOLVERS,
    **_UPDATES,
    **_NETWORKS,
}
"""Name -> a function that solves and gives the account."""
