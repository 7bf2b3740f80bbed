"""What test_sharded.py lets two processes do; started once, and forks them."""

from __future__ import annotations

import json
import os
import pickle
import signal
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gpytorch
import torch
from torch import Tensor
from torch.distributed import TCPStore

import sgdgp
from sgdgp.core import team
from sgdgp.core.processes import Processes, ProcessesError
from sgdgp.features import PriorDraws
from sgdgp.operators import KernelOperator, operator_by_name
from sgdgp.operators.sharded import ShardedOperator
from sgdgp.solvers import preconditioners
from sgdgp.solvers.auto import SOLVERS
from sgdgp.training.evidence import log_determinant

N = 600


class Model(gpytorch.models.ExactGP):
    """A model with priors on its parameters, as they have to be sent."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        super().__init__(x, y, gpytorch.likelihoods.GaussianLikelihood())
        prior = gpytorch.priors.GammaPrior(2.0, 1.0)
        base = gpytorch.kernels.MaternKernel(nu=1.5, lengthscale_prior=prior)
        self.mean_module = gpytorch.means.ConstantMean()
        self.covar_module = gpytorch.kernels.ScaleKernel(base)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        """The prior at x."""
        mean, covariance = self.mean_module(x), self.covar_module(x)
        return gpytorch.distributions.MultivariateNormal(mean, covariance)


class Unreadable:
    """Arrives nowhere."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("no number",)


def problem() -> tuple[Model, Tensor, Tensor]:
    """A model, and points of which some are its own."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(N, 2, generator=g, dtype=torch.float64)
    y = x.sin().sum(1) + 0.3 * torch.randn(N, generator=g).double()
    new = torch.randn(1100, 2, generator=g).double()
    return Model(x, y).double(), x, torch.cat([x[:5], new])


def products(operator: KernelOperator, x_new: Tensor) -> dict[str, Tensor]:
    """Whatever can be asked of an operator."""
    g = torch.Generator().manual_seed(1)
    n = operator.shape[0]
    v = torch.randn(n, 3, generator=g).to(operator.x)
    some = torch.randperm(n, generator=g)[:300]
    followed = operator.tracked(v)
    first = operator.rows_of_product(some[:100], followed)
    followed.move(operator.move(some[:7], v[:7]), -0.5)
    other = followed.clone()
    other.scale(2.0)
    followed.set_to_difference(other, operator.tracked(v), 0.25)
    followed.add(other, 3.0)
    last = followed.columns(torch.tensor([True, False, True]))
    last.copy(last.clone())
    last.move(operator.move(slice(3, 5), v[:2, :2]))
    return {
        "matmul": operator.matmul(v),
        "rows": operator.rows(some).matmul(v),
        "few rows": operator.rows(slice(3, 9)).matmul(v),
        "columns": operator.columns(some).matmul(v[:300]),
        "cross": operator.cross(x_new).matmul(v),
        "at": operator.product_at(x_new, v),
        "permuted": operator.permuted(some).matmul(v[:300]),
        "float32": operator.to(torch.float32).matmul(v.float()),
        "block": operator.block(some[:5], slice(0, 9)),
        "diagonal": operator.diagonal(),
        "first followed": first,
        "last followed": operator.rows_of_product(slice(1, 99), last),
    }


def gradients(operator: KernelOperator, x: Tensor) -> dict[str, Tensor]:
    """A quadratic form, and all its gradients."""
    g = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, len(x), 2, generator=g).to(x)
    points = x.clone().requires_grad_()
    inputs = [*operator.kernel.parameters(), points]
    form = operator.quadratic_form(a, b, x=points)
    found = torch.autograd.grad(form, inputs)
    with torch.no_grad():
        number = operator.quadratic_form(a, b)
    return {
        "form": form.detach(),
        "number": number,
        **{f"gradient {i}": gradient for i, gradient in enumerate(found)},
    }


def answers() -> dict[str, Tensor]:
    """What has to be the same, however many processes there are."""
    preconditioners._WORTH_MESSAGES = 0
    model, x, x_new = problem()
    operator = operator_by_name("sharded", model.covar_module, x)
    other = gpytorch.kernels.PiecewisePolynomialKernel(q=1)  # GPyTorch's, by row blocks
    rows = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    found = {f"product {k}": v for k, v in products(operator, x_new).items()}
    found |= {
        f"any kernel {k}": v
        for k, v in gradients(ShardedOperator(other, rows), rows).items()
    }
    found |= gradients(operator, x)
    pivoted = sgdgp.solvers.PivotedCholesky(rank=40, block_size=16)
    solvers = {name: solver() for name, solver in SOLVERS.items()}
    solvers["pivoted"] = sgdgp.CG(preconditioner=pivoted)
    near = sgdgp.solvers.TwoLevel(pivoted, neighbours=8)
    solvers["neighbours"] = sgdgp.CG(preconditioner=near)
    for name, given in solvers.items():
        budget = None if given.limits.max_passes is None else 3.0
        posterior = sgdgp.condition(
            model,
            solver=given.with_limits(sgdgp.solvers.Limits(0.3, budget)),
            operator="sharded",
            num_samples=3,
            num_features=64,
        )
        found[name] = posterior.solution.weights
    value, _, _ = log_determinant(
        operator,
        torch.full((N,), 0.1).double(),
        num_probes=2,
        generator=torch.Generator().manual_seed(4),
    )
    found["log determinant"] = torch.tensor([value])
    draws = posterior.problem.draws
    assert isinstance(draws, PriorDraws)
    found["prior draws"] = draws(x_new)
    variances = sgdgp.posterior.variances.PartialVariances.prepare(
        posterior.problem.operator, posterior.problem.noise, found["cg"]
    )
    bound, explained, rest = variances.explain(x_new)
    assert rest is not None
    found |= {"bound": bound, "explained": explained, "known": explained - rest}
    probes = sgdgp.training.StandardProbes(2)
    sgdgp.fit(model, steps=2, operator="sharded", solver="cg", probes=probes)
    found["fitted"] = torch.stack([p.detach().sum() for p in model.parameters()])
    return found


def share(processes: Processes, what: Any) -> tuple[Tensor]:
    """Rows of this process; and what may go wrong with them."""
    if what == "fail" and processes.rank == 1:
        raise ValueError("no rows here")
    if what == "Ctrl-C" and processes.rank == 0:
        raise KeyboardInterrupt("by the user")
    if isinstance(what, int) and processes.rank == 1:
        os.kill(what, signal.SIGINT)  # the leader waits by now
        time.sleep(0.2)
    return (torch.full((processes.rank, 2), float(processes.rank)),)


def faults() -> list[str]:
    """What the leader is told of what goes wrong."""
    told = []
    for what in ("fail", Unreadable(), "Ctrl-C", os.getpid(), "nothing"):
        try:
            told.append(str(team.together(share, what)[0].tolist()))
        except (ProcessesError, KeyboardInterrupt) as error:
            told.append(f"{type(error).__name__}: {error}")
    return [*told, f"after an argument that cannot be sent: {in_step()}"]


_made: list[int] = []


def made_late(value: float) -> Tensor:
    """Fails at first."""
    _made.append(1)
    if len(_made) == 1:
        raise MemoryError("no room just now")
    return torch.full((1,), value)


def own(processes: Processes, what: Tensor) -> tuple[Tensor]:
    """The tensor of the last process."""
    return (what if processes.rank else what[:0],)


def kept_late() -> list[str]:
    """What fails where it is sent is sent again."""
    what, told = torch.full((1,), 3.0), []
    for _ in range(2):
        team.keep(what, made_late, 3.0)
        try:
            told.append(str(team.together(own, what)[0]))
        except ProcessesError as error:
            told.append(str(error))
    return told


def carried() -> dict[str, bool]:
    """Whether tensors of any type arrive, small and large."""
    types = torch.int16, torch.bool, torch.bfloat16, torch.float8_e4m3fn
    given = [torch.arange(n).to(dtype) for dtype in types for n in (3, 2**19)]
    given += [torch.ones(n, dtype=torch.cfloat).mul(1j).conj() for n in (3, 2**19)]
    return {
        f"{what.dtype} {len(what)}": torch.equal(
            team.together(own, what)[0].cfloat(), what.cfloat()
        )
        for what in given
    }


def in_step() -> bool:
    """Whether a change that waits for a message outlives one that fails here."""
    model, x, _ = problem()
    operator = operator_by_name("sharded", model.covar_module, x)
    followed = operator.tracked(torch.ones_like(x))
    operator.rows_of_product(slice(0, N), followed)
    followed.scale(2.0)
    with suppress(pickle.PicklingError, AttributeError):
        team.together(share, lambda: None)
    found = operator.rows_of_product(slice(0, N), followed)
    return torch.allclose(found, operator.matmul(followed.values))


def two() -> dict[str, Any]:
    """In the leader of two."""
    found = answers()
    return {
        "answers": found,
        "faults": faults(),
        "kept late": kept_late(),
        "carried": carried(),
    }


def killed(path: Path) -> dict[str, Any]:
    """In the leader of two, the other of which ends amid a solve."""
    passes = []

    def callback(progress: sgdgp.solvers.Progress) -> None:
        passes.append(progress.passes)
        if len(passes) == 2:
            os.kill(_others[0], signal.SIGKILL)

    solve(path, callback)
    return {}


def solve(path: Path | None, callback: Any = None) -> Tensor:
    """Weights of a solve with a checkpoint."""
    model, _, _ = problem()
    posterior = sgdgp.condition(
        model,
        solver=sgdgp.CG(tolerance=1e-6, preconditioner=None),
        operator="sharded",
        num_samples=2,
        num_features=64,
        checkpoint=path,
        checkpoint_every=1e-3,
        callback=callback,
    )
    return posterior.solution.weights


_others: list[int] = []


def in_two(main: Callable[[], dict[str, Any]], out: Path) -> list[int]:
    """Fork two processes for a program; how they ended."""
    # As torchrun does it: one store for whatever the processes start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.environ |= {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children: list[int] = []
    for rank in (1, 0):
        child = os.fork()
        if not child:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            _others[:] = children
            # Where it is ignored from the start, as in a shell's background.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            status = 1
            try:
                cpu = torch.device("cpu")
                sgdgp.distribute(list, device=cpu)  # the next one is not the first
                found = sgdgp.distribute(main, device=cpu)
                if found is not None:
                    torch.save(found, out)
                status = 0
            except Exception as error:
                out.with_suffix(f".{rank}").write_text(str(error))
            finally:
                os._exit(status)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for c in reversed(children)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    folder = Path(sys.argv[1])
    torch.save(answers(), folder / "alone.pt")
    ends = {
        "two": in_two(two, folder / "two.pt"),
        "killed": in_two(lambda: killed(folder / "solve"), folder / "killed.pt"),
    }
    (folder / "ends.json").write_text(json.dumps(ends))
