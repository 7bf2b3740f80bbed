"""The command line of the reference posteriors' study; see README.md beside this."""

from __future__ import annotations

import sys

from benchmarks.reference_posteriors.run import STUDY

if __name__ == "__main__":
    sys.exit(STUDY.main())
