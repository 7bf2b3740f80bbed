"""Priors that other tasks taught: ``python -m benchmarks.learned_priors``."""
