import torch
from gpytorch.kernels import RBFKernel

import sgdgp
from sgdgp.operators import DenseOperator
from sgdgp.solvers.preconditioners import PivotedCholesky
from sgdgp.solvers.system import as_system
from sgdgp.training.kept_preconditioner import KeptPreconditioner
from tests.training.problems import data


def system(n=120, lengthscale=1.0):
    x, y = data(n, 2)
    kernel = RBFKernel().double()
    kernel.lengthscale = lengthscale
    noise = torch.full((n,), 0.05, dtype=torch.float64)
    return as_system(DenseOperator(kernel, x), noise, y.unsqueeze(1))


def test_it_is_made_once_for_as_many_systems_as_told(generator):
    kept = KeptPreconditioner(PivotedCholesky(20), uses=3)
    costs, inverses = [], []
    for _ in range(7):
        costs.append(kept.cost(120))
        inverses.append(kept.prepare(system(), generator))
    is_new = [inverse.passes > 0.0 for inverse in inverses]
    assert is_new == [True, False, False, True, False, False, True]
    assert [cost > 0.0 for cost in costs] == is_new


def test_an_old_inverse_is_that_of_the_first_system(generator):
    kept = KeptPreconditioner(PivotedCholesky(20), uses=2)
    r = system().rhs
    first = kept.prepare(system(), generator)(r)
    again = kept.prepare(system(lengthscale=1.1), generator)(r)
    assert torch.equal(first, again)
    assert not torch.equal(kept.prepare(system(lengthscale=1.1), generator)(r), first)


def test_another_number_of_rows_makes_a_new_one(generator):
    kept = KeptPreconditioner(PivotedCholesky(20), uses=5)
    kept.prepare(system(), generator)
    smaller = system(n=90)
    assert kept.prepare(smaller, generator).passes > 0.0
    assert kept.prepare(smaller, generator)(smaller.rhs).shape == (90, 1)


def test_solutions_with_an_old_one_are_as_accurate(generator):
    kept = KeptPreconditioner(PivotedCholesky(20), uses=2)
    solver = sgdgp.CG(tolerance=1e-8, preconditioner=kept)
    x, y = data(120, 2)
    noise = torch.full((120,), 0.05, dtype=torch.float64)
    for lengthscale in (1.0, 1.1):
        kernel = RBFKernel().double()
        kernel.lengthscale = lengthscale
        solution = solver.solve(
            DenseOperator(kernel, x), noise, y.unsqueeze(1), generator=generator
        )
        dense = kernel(x).to_dense().detach() + noise.diag()
        left = (dense @ solution.weights).squeeze(1) - y
        assert float(left.norm() / y.norm()) < 2e-8
