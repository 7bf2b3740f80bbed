"""Errors of posterior variances: of functions alone, and of the default."""
