"""Hamiltonian Monte Carlo: aligned draws beside Laplace's Gaussian, bad runs, cost.

The teacher is a network of one hidden layer whose units differ clearly, so that the
posterior of as many units is narrow about copies of one mode: what is known of it then
is Gaussian, and chains are a reference to within their own noise.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from benchmarks.checks import Check
from benchmarks.reference_posteriors.alignment import digits
from benchmarks.study import Record, Row
from sgdgp.networks import (
    Categorical,
    CompactGaussian,
    Draws,
    Gaussian,
    Isotropic,
    Potential,
    SymmetryGroup,
    align,
    hmc,
    linearise,
    match_weights,
)

NOISE, EXAMPLES, CHAINS, DRAWS = 0.05, 300, 6, 300

UNITS = (3, 4)
"""Hidden units of teachers whose posterior has one mode, up to symmetry."""

_TRIES = 4
"""Optimisations of which the best is where a chain begins: of networks of three or four
units every third or so ends in a worse mode, which chains would stay in."""


class Teacher:
    """Data of a network, and networks like it trained on them.

    Args:
        units: Hidden units of the teacher.
        seed: Of everything.
    """

    def __init__(self, units: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, dtype=torch.float64)

        self.units = units
        first, last = nn.Linear(2, units).double(), nn.Linear(units, 1).double()
        angle = math.pi * (torch.arange(units) + 0.5 * uniform(units)) / units
        direction = torch.stack([angle.cos(), angle.sin()], 1)
        with torch.no_grad():
            first.weight.copy_(direction * (1.5 + uniform(units, 1)))
            first.bias.copy_(2 * uniform(units) - 1)
            last.weight.copy_(1 + uniform(1, units))
            last.bias.zero_()
        teacher = nn.Sequential(first, nn.Tanh(), last)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.x, self.x_test = normal(EXAMPLES, 2), normal(200, 2)
        with torch.no_grad():
            self.y = teacher(self.x) + NOISE * normal(EXAMPLES, 1)
            self.f_test = teacher(self.x_test)
        self.data = [(self.x, self.y)]
        self._normal = normal

    def _network(self) -> nn.Sequential:
        layers = nn.Linear(2, self.units), nn.Tanh(), nn.Linear(self.units, 1)
        return nn.Sequential(*layers).double().eval()

    def potential(self, row: Float[Tensor, " D"] | None = None) -> Potential:
        """Of a network with these weights."""
        network = self._network()
        if row is not None:
            nn.utils.vector_to_parameters(row, network.parameters())
        return Potential.from_network(network, Gaussian(noise=NOISE**2), self.data)

    def optima(self, count: int, tries: int) -> Float[Tensor, "k D"]:
        """Each the best of some optimisations from draws of the prior."""
        potential, found = self.potential(), []
        for _ in range(count):
            starts = self._normal(tries, potential.num_weights)
            ends = torch.stack([_optimum(potential, start) for start in starts])
            found.append(ends[potential(ends).argmin()])
        return torch.stack(found)


def _optimum(potential: Potential, start: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    row = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [row], max_iter=1000, history_size=30, line_search_fn="strong_wolfe"
    )

    def closure() -> Any:
        value, gradient = potential.value_and_gradient(row.detach()[None])
        row.grad = gradient[0]
        return value[0]

    optimiser.step(closure)
    return row.detach()


def measure_teacher(seed: int) -> Record:
    """Chains from independent restarts, aligned, beside Laplace's Gaussian."""
    return {str(units): _aligned(Teacher(units, seed)) for units in UNITS}


def _aligned(teacher: Teacher) -> Record:
    started = time.process_time()
    rows = teacher.optima(CHAINS, _TRIES)
    best = rows[teacher.potential()(rows).argmin()]
    potential = teacher.potential(best)
    draws = hmc(
        potential, chains=CHAINS, draws=DRAWS, warmup=100, start=rows, progress=False
    )
    seconds = time.process_time() - started
    group = SymmetryGroup.of(potential)
    aligned, report = align(draws, group)
    unsigned, without = align(draws, group.restricted(signs=False))

    def rmse(which: Draws) -> float:
        outputs = potential.outputs(which.flat.mean(0)[None], teacher.x_test)[0]
        return float((outputs - teacher.f_test).square().mean().sqrt())

    # The same member of the group takes Laplace's mode to where the draws are.
    mode = match_weights(best, aligned.flat.mean(0), group).apply(best)
    posterior = linearise(
        teacher.potential(mode).tangent.network,
        Gaussian(noise=NOISE**2),
        Isotropic(),
        mean="network",
    ).fit(teacher.data, precision=1.0, steps=0, progress=False, solver="cholesky")
    laplace = CompactGaussian.of_posterior(posterior).standard_deviation
    own = CompactGaussian.of(aligned).standard_deviation
    outputs = draws.function(potential, teacher.x_test).flatten(0, 1)[..., 0]
    jacobian = posterior.tangent.at(teacher.x_test).jacobian()[:, 0]
    gram = posterior.tangent.at(teacher.x).jacobian()[:, 0]
    precision = gram.mT @ gram / NOISE**2 + torch.eye(len(best)).double()
    tangent = (jacobian @ precision.inverse() * jacobian).sum(1)
    variances = outputs.var(0) / tangent
    assert report.r_hat_before is not None
    assert report.r_hat_after is not None
    assert draws.outputs is not None
    return {
        "cpu seconds": seconds,
        "acceptance": float(draws.acceptance.mean()),  # type: ignore[union-attr]
        "gradients": draws.num_gradients,
        "raw variance": report.variance_before,
        "reduction": report.variance_reduction,
        "reduction without signs": without.variance_reduction,
        "raw R-hat of ranks": float(report.r_hat_before.max()),
        "R-hat of ranks": float(report.r_hat_after.max()),
        "raw R-hat": classical_r_hat(draws),
        "R-hat": classical_r_hat(aligned),
        "R-hat without signs": classical_r_hat(unsigned),
        "raw error": rmse(draws),
        "error": rmse(aligned),
        "error without signs": rmse(unsigned),
        "correlation": float(
            torch.corrcoef(torch.stack([laplace.log(), own.log()]))[0, 1]
        ),
        "deviations": float((laplace / own).median()),
        "function deviations": float(variances.rsqrt().median()),
        "function variances": float(variances.median()),
        "warnings": list(draws.warnings),
    }


def classical_r_hat(draws: Draws) -> float:
    """The largest split R-hat of weights themselves.

    That of ranks knows no distance: six chains however far apart have one of about
    three.
    """
    halves = torch.cat(draws.weights.chunk(2, dim=1))
    within, between = halves.var(1).mean(0), halves.mean(1).var(0)
    return float((1 + between / within).sqrt().max())


def check_teacher(records: Sequence[Record]) -> Iterable[Check]:
    """A3, A4 and the sampler's part of X1."""
    for units in UNITS:
        found = [record[str(units)] for record in records]

        def name(what: str, units: int = units) -> str:
            return f"teacher of {units} units: {what}"

        def worst(key: str, most: bool, found: list[Record] = found) -> float:
            return (max if most else min)(r[key] for r in found)

        def between(
            key: str, low: float, high: float, found: list[Record] = found
        ) -> tuple[str, str, bool]:
            values = [r[key] for r in found]
            figure = f"{min(values):.3f} to {max(values):.3f}"
            return figure, f"{low} to {high}", low <= min(values) <= max(values) <= high

        reduction = worst("reduction", False)
        yield Check(
            name("variance that alignment removes"),
            f"{reduction:.1%}",
            "at least 95 %",
            reduction >= 0.95,
        )
        ranked = worst("R-hat of ranks", True)
        r_hat, raw = max(worst("R-hat", True), ranked), worst("raw R-hat", False)
        yield Check(
            name("R-hat of weights, largest"),
            f"{r_hat:.3f} (raw {raw:.1f})",
            "at most 1.1 (raw at least 10)",
            r_hat <= 1.1 and raw >= 10,
        )
        error, raw = worst("error", True), worst("raw error", False)
        yield Check(
            name("error of the mean network"),
            f"{error:.3f} (raw {raw:.2f})",
            "at most .05 (raw at least .5)",
            error <= 0.05 and raw >= 0.5,
        )
        without = worst("reduction without signs", True)
        fails = all(
            r["reduction without signs"] < 0.95 and r["R-hat without signs"] > 1.1
            for r in found
        )
        yield Check(
            name("variance removed without signs"),
            f"{without:.1%}",
            "fails the three above",
            fails,
        )
        correlation = worst("correlation", False)
        yield Check(
            name("log deviations, Laplace and chains, correlation"),
            f"{correlation:.4f}",
            "at least .97",
            correlation >= 0.97,
        )
        yield Check(
            name("deviations, Laplace over chains, median"),
            *between("deviations", 0.9, 1.1),
        )
        yield Check(
            name("deviations of the function, the same"),
            *between("function deviations", 0.95, 1.05),
        )
        yield Check(
            name("variances of the function, chains over Laplace"),
            *between("function variances", 0.95, 1.05),
        )


def measure_bad_runs(seed: int) -> Record:
    """Runs that must be reported as unfit, and in what words."""
    teacher = Teacher(6, seed)
    rows = teacher.optima(CHAINS, 1)
    potential = teacher.potential(rows[0])
    settings: dict[str, Any] = {"chains": CHAINS, "draws": 200, "progress": False}
    modes = hmc(potential, warmup=100, start=rows, **settings)
    _, report = align(modes, SymmetryGroup.of(potential))
    # The mass matrix of one copy for all, and a step that is never accepted in others.
    gram = potential.tangent.at(teacher.x).jacobian()[:, 0]
    precision = gram.mT @ gram / NOISE**2 + torch.eye(len(rows[0])).double()
    step = hmc(
        potential,
        warmup=0,
        step_size=0.25,
        leapfrog=6,
        start=rows,
        mass=precision,
        **settings,
    )
    assert report.r_hat_after is not None
    return {
        "energies": sorted(potential(rows).tolist()),
        "modes": _run(modes),
        "modes, R-hat of aligned weights": float(report.r_hat_after.max()),
        "modes, words of alignment": list(report.warnings),
        "step": _run(step),
    }


def _run(draws: Draws) -> Record:
    assert draws.outputs is not None
    assert draws.acceptance is not None
    assert draws.divergent is not None
    from sgdgp.networks.sampling.diagnostics import split_r_hat

    return {
        "acceptance": float(draws.acceptance.mean()),
        "divergent": int(draws.divergent.sum()),
        "R-hat": float(split_r_hat(draws.outputs).max()),
        "warnings": list(draws.warnings),
    }


def check_bad_runs(records: Sequence[Record]) -> Iterable[Check]:
    """E: said aloud, not summarised."""
    for key, sentence, what in (
        ("modes", "have not mixed", "chains in different modes"),
        ("step", "is too large", "a step size that is too large"),
    ):
        told = [any(sentence in w for w in r[key]["warnings"]) for r in records]
        figure = (
            f"R-hat of outputs {min(r[key]['R-hat'] for r in records):.2f}, acceptance "
            f"{max(r[key]['acceptance'] for r in records):.0%}"
        )
        yield Check(what, figure, f'says "{sentence}"', all(told))
    words = all(r["modes, words of alignment"] for r in records)
    worst = min(r["modes, R-hat of aligned weights"] for r in records)
    yield Check(
        "chains in different modes, aligned",
        f"R-hat of weights {worst:.2f}",
        "alignment warns",
        words,
    )


def measure_cost(seed: int) -> Record:
    """Gradients a second of chains, and of the same gradients alone; a killed run."""
    images, classes = digits()
    x, y = images[:500].flatten(1), classes[:500]
    network = nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    potential = Potential.from_network(network, Categorical(), [(x, y)])
    chains, count = 4, 1000

    def loss(row: Tensor) -> Tensor:
        weights = {n: w[0] for n, w in potential.tangent.weights_of(row[None]).items()}
        logits = functional_call(network, weights, (x,))
        fit = nn.functional.cross_entropy(logits, y, reduction="sum")
        return fit + 0.5 * row.square().sum()

    gradients = vmap(grad(loss))
    rows = potential.theta + 0.1 * torch.randn(chains, potential.num_weights)
    # In turns, by processor time: other work on the machine slows both alike.
    alone, inside = [], []
    for _ in range(3):
        start = time.process_time()
        for _ in range(count):
            gradients(rows)
        alone.append(chains * count / (time.process_time() - start))
        start = time.process_time()
        draws = hmc(
            potential,
            chains=chains,
            draws=count // 10,
            warmup=0,
            leapfrog=10,
            step_size=0.1,
            seed=seed,
            progress=False,
        )
        inside.append(draws.num_gradients / (time.process_time() - start))
    return {
        "alone": median(alone),
        "inside": median(inside),
        "ratio": median(i / a for i, a in zip(inside, alone, strict=True)),
        "same after kill -9": _resumes(seed),
    }


def check_cost(records: Sequence[Record]) -> Iterable[Check]:
    """F."""
    ratio = min(record["ratio"] for record in records)
    yield Check(
        "gradients a second inside HMC, of those alone",
        f"{ratio:.2f}",
        "at least .8",
        ratio >= 0.8,
    )
    same = all(record["same after kill -9"] for record in records)
    yield Check(
        "a run killed with -9 and called again",
        "the same draws" if same else "other draws",
        "the same draws",
        same,
    )


def _small_run(seed: int, checkpoint: Path | None, callback: Any = None) -> Draws:
    teacher = Teacher(3, seed)
    return hmc(
        teacher.potential(teacher.optima(1, 1)[0]),
        chains=2,
        draws=60,
        warmup=40,
        leapfrog=4,
        seed=seed,
        checkpoint=checkpoint,
        checkpoint_every=0.05,
        callback=callback,
        progress=False,
    )


def _resumes(seed: int) -> bool:
    """Whether a run that is killed at step 70 and begun again has the same draws."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "run")
        module = "benchmarks.reference_posteriors.chains"
        child = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, str(path), str(seed)],
            check=False,
        )
        found = _small_run(seed, path)
        expected = _small_run(seed, None)
        return child.returncode == -signal.SIGKILL and bool(
            (found.weights == expected.weights).all()
        )


ROWS = {
    "chains-teacher": Row(measure_teacher, check_teacher, (0, 1, 2)),
    "chains-refused": Row(measure_bad_runs, check_bad_runs),
    "chains-cost": Row(measure_cost, check_cost),
}


if __name__ == "__main__":
    torch.set_num_threads(1)

    def kill(progress: Any) -> None:
        if progress.step == 70:
            os.kill(os.getpid(), signal.SIGKILL)

    _small_run(int(sys.argv[2]), Path(sys.argv[1]), kill)
