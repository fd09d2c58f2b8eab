"""Tests of the Triton kernels' machine code, without a GPU; `tests/test_triton.py` runs them in a
process of its own, because they give Triton a driver that only pretends."""

import os

collect_ignore_glob = [] if os.environ.get("PYOPTIM_TRITON_AOT") == "1" else ["test_*.py"]
