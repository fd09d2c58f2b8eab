"""`python -m bench` in a source tree; where pyoptim is installed: `python -m pyoptim bench`."""

import sys

from .cli import main

sys.exit(main())
