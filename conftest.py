"""For tests and notebooks alike: processes that run side by side keep their compiled OpenCL kernels apart.

PoCL aborts where two processes build the same kernel in one cache.
"""
import os
from pathlib import Path

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    cache = os.environ.get("POCL_CACHE_DIR") or Path.home() / ".cache" / "pocl"
    os.environ["POCL_CACHE_DIR"] = str(Path(cache) / f"minillama-{WORKER}")
