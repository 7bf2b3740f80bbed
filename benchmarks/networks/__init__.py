"""Networks that say how sure they are: ``python -m benchmarks.networks``."""
