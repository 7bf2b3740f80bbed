"""Uncertainty of tomographic reconstructions, held against other methods."""
