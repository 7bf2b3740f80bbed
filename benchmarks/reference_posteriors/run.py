"""Rows of the study, of which this module runs one."""

from __future__ import annotations

import sys

from benchmarks.reference_posteriors import (
    alignment,
    chains,
    pruning,
    variances,
    weights,
)
from benchmarks.study import Study

STUDY = Study(
    "reference_posteriors",
    "Approximate posteriors held against references.",
    {
        **variances.ROWS,
        **alignment.ROWS,
        **chains.ROWS,
        **pruning.ROWS,
        **weights.ROWS,
    },
)
"""All rows by name; a module for each kind of question."""


if __name__ == "__main__":
    sys.exit(STUDY.run(sys.argv[1:]))
