"""`python -m pyoptim.bench.arc COMMAND`: see `--help`."""

import sys

from .cli import main

sys.exit(main())
