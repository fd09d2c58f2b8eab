"""Tests of the Triton kernels' machine code, without a GPU; `tests/test_triton.py` runs them in a
process of its own, because they give Triton a driver that only pretends. All kernels of all
architectures: PYOPTIM_TRITON_AOT=all TRITON_INTERPRET=0 pytest tests/triton_aot"""

import os

collect_ignore_glob = [] if os.environ.get("PYOPTIM_TRITON_AOT") in ("1", "all") else ["test_*.py"]
