"""The UCI regression study of the SGD-GP papers: ``python -m benchmarks.uci``."""
