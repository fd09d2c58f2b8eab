"""`python -m pyoptim.bench.line_search`: see `--help`."""

import sys

from .cli import main

# Workers are started by importing this file under another name.
if __name__ == "__main__":
    sys.exit(main())
