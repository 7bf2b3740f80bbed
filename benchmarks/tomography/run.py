"""Rows of the study, of which this module runs one."""

from __future__ import annotations

import sys

from benchmarks.study import Study
from benchmarks.tomography import design, digits, shepp_logan, volumes

STUDY = Study(
    "tomography",
    "Uncertainty of tomographic reconstructions.",
    {**shepp_logan.ROWS, **digits.ROWS, **design.ROWS, **volumes.ROWS},
)
"""All rows by name; a module for each kind of question."""


if __name__ == "__main__":
    sys.exit(STUDY.run(sys.argv[1:]))
