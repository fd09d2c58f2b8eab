"""`python -m pyoptim`."""

import sys

from pyoptim.cli import main

if __name__ == "__main__":
    sys.exit(main())
