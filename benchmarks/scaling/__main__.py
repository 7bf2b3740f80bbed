"""The command line of the study of growth; see README.md beside this."""

from __future__ import annotations

import sys

from benchmarks.scaling.run import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
