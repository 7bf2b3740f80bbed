"""The command line of the study of tomography; see README.md beside this."""

from __future__ import annotations

import sys

from benchmarks.tomography.run import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
