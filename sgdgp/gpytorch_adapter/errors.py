"""What the adapter raises where a model cannot be read."""

from __future__ import annotations


class UnsupportedModelError(ValueError):
    """The model's prior cannot be read as one kernel between pairs of points."""
