"""Reproductions and measurements; run from the repository root."""
