"""``python -m sgdgp``, which is the command ``sgdgp``."""

import sys

try:
    from sgdgp.command_line import main
except ImportError as error:
    sys.exit(f"sgdgp: {error}")

if __name__ == "__main__":
    sys.exit(main())
