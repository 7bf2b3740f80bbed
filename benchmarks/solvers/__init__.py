"""Timings of the solvers and operators on synthetic data."""
