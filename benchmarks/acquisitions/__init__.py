"""Bayesian optimisation by BoTorch's acquisitions, with two kinds of posterior."""
