"""Timings of the solvers and operators, on synthetic and on real data."""

import sgdgp  # noqa: F401  (first: importing GPyTorch itself prints what KeOps lacks)
