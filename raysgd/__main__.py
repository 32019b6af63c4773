"""``python -m raysgd``: the command line without an installed script."""

import sys

from raysgd.cli import main

if __name__ == "__main__":
    sys.exit(main())
