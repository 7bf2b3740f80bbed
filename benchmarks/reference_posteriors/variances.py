"""Hessian-free variances beside the Hessian's, the Gauss-Newton matrix's and others.

Networks are trained to their maximum a posteriori by L-BFGS, in float64. The Hessian is
that of ``torch.func`` there, of up to 2,700 weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.checks import Check
from benchmarks.study import Record, Row
from benchmarks.uci.data import load_split
from sgdgp.networks import (
    Categorical,
    Gaussian,
    HessianFree,
    Isotropic,
    Likelihood,
    Potential,
    linearise,
)
from sgdgp.networks.curvature import TangentData, WeightSystem
from sgdgp.networks.kronecker_curvature import kronecker_curvature
from sgdgp.networks.priors import precision_sum

_STEPS, _TOGETHER = 2000, 128
"""Of L-BFGS, and columns of a Hessian at a time."""

_NOISE = 0.05
"""Variance of standardised targets: with that of the residuals, a thirtieth of it, the
search takes many times as long to where the Hessian is positive definite."""


@dataclass(frozen=True)
class Problem:
    """A network with its data and prior.

    Attributes:
        network: Trained as far as it is.
        likelihood: Of the targets.
        x: Training inputs (n, d).
        y: Their targets.
        x_test: Inputs whose variances are asked for (b, d).
        precision: Of the prior N(0, 1 / precision).
    """

    network: nn.Module
    likelihood: Likelihood
    x: Float[Tensor, "n d"]
    y: Tensor
    x_test: Float[Tensor, "b d"]
    precision: float = 1.0

    @cached_property
    def potential(self) -> Potential:
        """U."""
        loader = DataLoader(TensorDataset(self.x, self.y), batch_size=len(self.x))
        return Potential.from_network(
            self.network, self.likelihood, loader, precision=self.precision
        )

    def loss(self, network: nn.Module) -> Tensor:
        """U by torch alone."""
        squares = sum(weight.square().sum() for weight in network.parameters())
        fit = self.likelihood.loss(network(self.x), self.y).sum()
        return fit + 0.5 * self.precision * squares

    def fit(self, adam: int = 0, steps: int = _STEPS) -> Problem:
        """Train the network, by so many steps of Adam or to the optimum."""
        weights = list(self.network.parameters())
        if adam:
            optimiser = torch.optim.Adam(weights, 1e-2)
            for _ in range(adam):
                optimiser.zero_grad()
                self.loss(self.network).backward()
                optimiser.step()
            return self
        search = torch.optim.LBFGS(
            weights,
            max_iter=steps,
            history_size=100,
            tolerance_grad=1e-9,
            tolerance_change=0.0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            search.zero_grad()
            value = self.loss(self.network)
            value.backward()
            return value

        search.step(closure)
        return self

    @cached_property
    def hessian(self) -> Float[Tensor, "D D"]:
        """Of U, column by column."""
        tangent = self.potential.tangent

        def loss(theta: Tensor) -> Tensor:
            weights = {n: w[0] for n, w in tangent.weights_of(theta[None]).items()}
            outputs = functional_call(self.network, weights, (self.x,))
            fit = self.likelihood.loss(outputs, self.y).sum()
            return fit + 0.5 * self.precision * theta.square().sum()

        theta = self.potential.theta
        unit = torch.eye(len(theta), dtype=theta.dtype)

        def column(v: Tensor) -> Tensor:
            return jvp(grad(loss), (theta,), (v,))[1]

        return vmap(column, chunk_size=_TOGETHER)(unit)

    @cached_property
    def system(self) -> WeightSystem:
        """Of the Gauss-Newton matrix."""
        potential = self.potential
        data = TangentData(potential.tangent, potential.stream, self.likelihood)
        return WeightSystem(
            data, potential.prior, self.likelihood, data.network_outputs
        )

    @cached_property
    def gauss_newton(self) -> Float[Tensor, "D D"]:
        """J^T H J + P."""
        found = self.precision * self.system.gram
        found.diagonal().add_(self.precision)
        return found

    @cached_property
    def jacobian(self) -> Float[Tensor, "m D"]:
        """Of all outputs at the test inputs."""
        return self.potential.tangent.at(self.x_test).jacobian().flatten(0, 1)

    def variance(self, matrix: Float[Tensor, "D D"]) -> Float[Tensor, " m"]:
        """Those of a precision of the weights."""
        return (self.jacobian * torch.linalg.solve(matrix, self.jacobian.mT).mT).sum(1)

    def free(self, **settings: object) -> Float[Tensor, " m"]:
        """Those without a Hessian."""
        method = HessianFree(**settings)  # type: ignore[arg-type]
        return method.variance(self.potential, self.x_test).variance.flatten()


def perceptron(inputs: int, *hidden: int, outputs: int = 1, seed: int) -> nn.Module:
    """A network of tanh in float64."""
    torch.manual_seed(seed)
    sizes, layers = (inputs, *hidden), []
    for i in range(len(hidden)):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs)).double().eval()


def gap(seed: int, *hidden: int) -> Problem:
    """Two clusters of 30 inputs with a gap between them."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(60, 1, generator=generator, dtype=torch.float64)
    x = 1.2 * uniform + torch.tensor([-2.0, 0.6]).repeat_interleave(30)[:, None]
    noise = torch.randn(60, 1, generator=generator, dtype=torch.float64)
    network = perceptron(1, *hidden, seed=seed)
    x_test = torch.linspace(-3, 3, 60, dtype=torch.float64)[:, None]
    y = torch.sin(3 * x) + 0.1 * noise
    return Problem(network, Gaussian(noise=0.01), x, y, x_test)


def regression(name: str, seed: int, hidden: int) -> Problem:
    """A set of UCI."""
    split = load_split(name, seed)
    network = perceptron(split.x.shape[1], hidden, seed=seed)
    return Problem(
        network,
        Gaussian(noise=_NOISE),
        split.x,
        split.y[:, None],
        split.x_test[:60],
    )


def digits(seed: int) -> Problem:
    """500 digits, 1 x 32; logits of 5 others."""
    found = load_digits()
    order = torch.randperm(
        len(found.target), generator=torch.Generator().manual_seed(seed)
    )
    x, y = torch.tensor(found.data)[order] / 16, torch.tensor(found.target)[order]
    network = perceptron(64, 32, outputs=10, seed=seed)
    return Problem(network, Categorical(), x[:500], y[:500], x[500:505])


def figures(found: Tensor, truth: Tensor) -> Record:
    """How two sets of variances agree."""
    wrong = ((found - truth) / truth).abs()
    return {
        "correlation": float(torch.corrcoef(torch.stack([found, truth]))[0, 1]),
        "median": float(wrong.median()),
        "p95": float(wrong.quantile(0.95)),
        "worst": float(wrong.max()),
        "negative": int((found <= 0).sum()),
    }


def _tangent(seed: int) -> Record:
    """B1, and samples of the posterior beside: all are of the same Gaussian."""
    problem = gap(seed, 50).fit()
    truth = problem.variance(problem.gauss_newton)
    # One column: its Krylov space grows by one dimension a step.
    one = Problem(problem.network, problem.likelihood, problem.x, problem.y, X_GAP)
    steps = (2, 4, 6, 8, 10, 20)
    rising = [
        float(one.free(mode="tangent", tolerance=1e-9, steps=s)[0]) for s in steps
    ]
    exact = float(one.variance(one.gauss_newton)[0])
    loader = DataLoader(TensorDataset(problem.x, problem.y), batch_size=60)
    posterior = linearise(problem.network, problem.likelihood, Isotropic()).fit(
        loader, steps=0, precision=1.0, final_samples=_SAMPLES, seed=seed
    )
    ratio = posterior.variance(problem.x_test).flatten() / truth
    return {
        **figures(problem.free(mode="tangent", tolerance=1e-6), truth),
        "rising": [value / exact for value in rising],
        "steps": list(steps),
        "sampled ratio": float(ratio.mean()),
        "sampled worst": float((ratio - 1).abs().max() / math.sqrt(2 / _SAMPLES)),
    }


X_GAP = torch.zeros(1, 1, dtype=torch.float64)
"""The middle of the gap."""

_SAMPLES = 1024

NONLINEAR = {
    "gap, 1 x 50": (0.999, 0.01, 0.05),
    "gap, 2 x 50": (0.995, 0.02, 0.10),
    "yacht, 1 x 50": (0.995, 0.02, 0.10),
}
"""Networks, and what is asked of correlation, median and 95th percentile."""


def _problem(name: str, seed: int) -> Problem:
    if name.startswith("gap"):
        return gap(seed, *([50] * int(name[5])))
    return regression("yacht", seed, 50)


def _nonlinear(seed: int) -> Record:
    """B2, B3: default settings, and a larger shift."""
    found: Record = {}
    for name in NONLINEAR:
        problem = _problem(name, seed).fit()
        truth = problem.variance(problem.hessian)
        lowest = float(torch.linalg.eigvalsh(problem.hessian)[0])
        begun = time.process_time()
        default = problem.free()
        seconds = time.process_time() - begun
        found[name] = {
            **figures(default, truth),
            "seconds": seconds,
            "smallest eigenvalue": lowest,
            "Gauss-Newton": figures(problem.variance(problem.gauss_newton), truth),
            "shift 0.3": figures(problem.free(shift=0.3), truth),
        }
    return found


def _order(seed: int) -> Record:
    """B4: errors of both forms as the shift falls from one deviation to a tenth."""
    problem = gap(seed, 50).fit()
    truth = problem.variance(problem.hessian)
    found: Record = {}
    for form, symmetric in (("one-sided", False), ("symmetric", True)):
        found[form] = [
            figures(
                problem.free(
                    shift=shift, symmetric=symmetric, tolerance=1e-4, max_asymmetry=1e3
                ),
                truth,
            )["p95"]
            for shift in (1.0, 0.1)
        ]
    return found


def _unconverged(seed: int) -> Record:
    """B5: after 500 steps of Adam, against the Hessian at the optimum from there."""
    problem = gap(seed, 50).fit(adam=500)
    forms = {
        "one-sided": {"symmetric": False, "control": False},
        "one-sided with control": {"symmetric": False},
        "symmetric": {"control": False},
        "default": {},
    }
    # Those without an optimum to start from never converge.
    variances = {n: problem.free(steps=100, **form) for n, form in forms.items()}
    problem.fit()
    best = Problem(
        problem.network, problem.likelihood, problem.x, problem.y, problem.x_test
    )
    truth = best.variance(best.hessian)
    return {name: figures(variance, truth) for name, variance in variances.items()}


def _probes(seed: int) -> Record:
    """B6: 64 probes on energy."""
    problem = regression("energy", seed, 30).fit()
    truth = problem.variance(problem.hessian)
    return figures(problem.free(probes=64), truth)


def _logits(seed: int) -> Record:
    """Each logit's variance on digits."""
    problem = digits(seed).fit()
    truth = problem.variance(problem.hessian)
    return {
        **figures(problem.free(), truth),
        "Gauss-Newton": figures(problem.variance(problem.gauss_newton), truth),
    }


IN_BETWEEN = {"energy": 30, "concrete": 50, "yacht": 50}
"""Hidden units of networks of sets of UCI."""

_APART = 60
"""Test inputs in a gap, and beside it."""


def without_middle(name: str, seed: int) -> tuple[Problem, Tensor]:
    """A set of UCI without the middle third along a random direction.

    Returns:
        The problem, whose test inputs are those of the gap and then others, and the
        targets of all of them (b,).
    """
    split = load_split(name, seed)
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(split.x.shape[1], generator=generator, dtype=split.x.dtype)
    along = split.x @ direction
    low, high = along.quantile(1 / 3), along.quantile(2 / 3)
    inside = (along > low) & (along < high)
    outside = (~inside).nonzero()[:, 0]
    order = outside[torch.randperm(len(outside), generator=generator)]
    middle = inside.nonzero()[:, 0]
    middle = middle[torch.randperm(len(middle), generator=generator)][:_APART]
    test = torch.cat([middle, order[:_APART]])
    train = order[_APART:]
    network = perceptron(split.x.shape[1], IN_BETWEEN[name], seed=seed)
    problem = Problem(
        network,
        Gaussian(noise=_NOISE),
        split.x[train],
        split.y[train, None],
        split.x[test],
    )
    # Before the optimum of concrete, 2,000 steps on, the Hessian is indefinite.
    return problem.fit(steps=4 * _STEPS), split.y[test]


def _in_between(seed: int) -> Record:
    """The papers' comparison: uncertainty where there are no data between data."""
    problems = {name: without_middle(name, seed) for name in IN_BETWEEN}
    toy = gap(seed, 50).fit()
    problems["gap"] = toy, torch.sin(3 * toy.x_test[:, 0])
    return {name: _compared(*problem) for name, problem in problems.items()}


def _compared(problem: Problem, y: Float[Tensor, " b"]) -> Record:
    potential, diagonal = problem.potential, problem.gauss_newton.diagonal()
    kronecker = precision_sum(
        potential.prior,
        kronecker_curvature(
            problem.system.data, problem.likelihood, problem.system.outputs
        ),
    )
    rows = problem.jacobian
    truth = problem.variance(problem.hessian)
    variances = {
        "Hessian": truth,
        "Hessian-free": problem.free(),
        "Gauss-Newton": problem.variance(problem.gauss_newton),
        "KFAC": (rows * kronecker.solve(rows.mT).mT).sum(1),
        "diagonal": (rows.square() / diagonal).sum(1),
    }
    mean = potential.tangent.outputs(problem.x_test)[:, 0]
    noise = problem.likelihood.variance
    assert isinstance(noise, float)
    if len(y) == 2 * _APART:
        parts: dict[str, Any] = {
            "between": slice(_APART),
            "beside": slice(_APART, None),
        }
    else:  # the toy's gap is from -0.8 to 0.6
        x = problem.x_test[:, 0]
        parts = {"between": (x > -0.8) & (x < 0.6)}
    found: Record = {"noise": noise}
    for name, variance in variances.items():
        record: Record = figures(variance, truth)
        for part, some in parts.items():
            spread = variance[some].clamp_min(0.0) + noise
            error = (y - mean)[some]
            record[part] = {
                "nll": float(
                    0.5 * (error**2 / spread + (2 * math.pi * spread).log()).mean()
                ),
                "coverage": float((error.abs() < 1.96 * spread.sqrt()).double().mean()),
                "deviation": float(variance[some].clamp_min(0.0).sqrt().mean()),
            }
        found[name] = record
    return found


def _tangent_checks(records: Sequence[Record]) -> Iterable[Check]:
    worst = max(r["worst"] for r in records)
    yield Check(
        "B1: tangent mode against J^T H J + P, relative error",
        f"{worst:.1e}",
        "at most 1e-6",
        worst <= 1e-6,
    )
    for record in records:
        rising = record["rising"]
        yield Check(
            "B1: part of the exact variance after "
            + ", ".join(map(str, record["steps"]))
            + " steps",
            ", ".join(f"{value:.3f}" for value in rising),
            "rising, at most 1",
            rising == sorted(rising) and rising[-1] <= 1 + 1e-12,
        )
    ratio = sum(r["sampled ratio"] for r in records) / len(records)
    away = max(r["sampled worst"] for r in records)
    yield Check(
        f"X1: {_SAMPLES} samples against the same, mean ratio; worst in its errors",
        f"{ratio:.3f}; {away:.1f}",
        "0.95 to 1.05; at most 4.5",
        0.95 <= ratio <= 1.05 and away <= 4.5,
    )


def _agreement(what: str, record: Record, asked: tuple[float, float, float]) -> Check:
    lowest, median, p95 = asked
    return Check(
        f"{what}: correlation, median, 95th percentile of the error",
        f"{record['correlation']:.5f}, {record['median']:.2%}, {record['p95']:.2%}",
        f"at least {lowest}; at most {median:.0%}, {p95:.0%}",
        record["correlation"] >= lowest
        and record["median"] <= median
        and record["p95"] <= p95,
    )


def _nonlinear_checks(records: Sequence[Record]) -> Iterable[Check]:
    for record in records:
        for name, asked in NONLINEAR.items():
            row = "B2" if name == "gap, 1 x 50" else "B3"
            yield _agreement(f"{row}: {name}", record[name], asked)


def _order_checks(records: Sequence[Record]) -> Iterable[Check]:
    for record in records:
        for form, least in (("one-sided", 5), ("symmetric", 30)):
            first, last = record[form]
            yield Check(
                f"B4: {form}, error (p95) at a shift of 1 over that at 0.1",
                f"{first / last:.0f} ({first:.2%}, {last:.2%})",
                f"at least {least}",
                first >= least * last,
            )


def _unconverged_checks(records: Sequence[Record]) -> Iterable[Check]:
    for record in records:
        plain = record["one-sided"]
        for form in ("one-sided with control", "default"):
            own = record[form]
            yield Check(
                f"B5: {form}, median error; negative variances",
                f"{own['median']:.2%} (without {plain['median']:.0%}); "
                f"{own['negative']} (without {plain['negative']})",
                "at most a fifth; 0",
                5 * own["median"] <= plain["median"] and own["negative"] == 0,
            )


def _probes_checks(records: Sequence[Record]) -> Iterable[Check]:
    for record in records:
        yield Check(
            "B6: 64 probes on energy, correlation, median error",
            f"{record['correlation']:.3f}, {record['median']:.1%}",
            "at least 0.9; at most 20%",
            record["correlation"] >= 0.9 and record["median"] <= 0.2,
        )


def _logits_checks(records: Sequence[Record]) -> Iterable[Check]:
    for record in records:
        yield Check(
            "Digits, 1 x 32: variances of logits, correlation (Gauss-Newton's)",
            f"{record['correlation']:.5f} "
            f"({record['Gauss-Newton']['correlation']:.3f})",
            "at least 0.99",
            record["correlation"] >= 0.99,
        )


def _in_between_checks(records: Sequence[Record]) -> Iterable[Check]:
    """Hessian-free is as the Hessian where it counts; others are beside."""
    for name in ("gap", *IN_BETWEEN):
        own = [record[name] for record in records]

        def mean(method: str, part: str, key: str, own: list[Record] = own) -> float:
            return sum(r[method][part][key] for r in own) / len(own)

        methods = ("Hessian", "Hessian-free", "Gauss-Newton", "KFAC", "diagonal")
        loss = {method: mean(method, "between", "nll") for method in methods}
        cover = {method: mean(method, "between", "coverage") for method in methods}
        away = abs(loss["Hessian-free"] - loss["Hessian"])
        yield Check(
            f"{name}, in the gap: NLL (coverage) of " + ", ".join(methods),
            ", ".join(f"{loss[m]:.2f} ({cover[m]:.0%})" for m in methods),
            "Hessian-free as the Hessian to 0.05",
            away <= 0.05,
        )


ROWS = {
    "variances-tangent": Row(_tangent, _tangent_checks),
    "variances-nonlinear": Row(_nonlinear, _nonlinear_checks),
    "variances-order": Row(_order, _order_checks),
    "variances-unconverged": Row(_unconverged, _unconverged_checks),
    "variances-probes": Row(_probes, _probes_checks),
    "variances-logits": Row(_logits, _logits_checks),
    "variances-between": Row(_in_between, _in_between_checks),
}
"""What ``python -m benchmarks.reference_posteriors`` runs of this module."""
