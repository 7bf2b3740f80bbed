"""What is installed with an extra is needed by its own room only."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
sys.modules["botorch"] = sys.modules["sklearn"] = sys.modules["matplotlib"] = None
import sgdgp
for room in ("botorch", "sklearn"):
    try:
        __import__("sgdgp." + room)
    except ImportError as error:
        print(error)
try:
    sgdgp.plot.posterior(None, None)
except ImportError as error:
    print(error)
"""


def test_the_package_needs_no_extra_and_its_rooms_name_theirs():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    )
    assert "pip install 'sgdgp[botorch]'" in found.stdout
    assert "pip install 'sgdgp[sklearn]'" in found.stdout
    assert "pip install 'sgdgp[plot]'" in found.stdout
