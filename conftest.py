"""For tests and notebooks alike: what fits side by side on one machine, and into its time.

PoCL aborts where two processes build the same kernel in one cache: each keeps its compiled OpenCL kernels apart.
After TEST_UNTIL (seconds since 1970) no test and no cell of a notebook begins: what does not fit is skipped, and said
to be. `.ci/run` sets it, so that a slow machine ends with what it could do, not with nothing.
"""
import os
import time
from pathlib import Path

import pytest

WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER:
    cache = os.environ.get("POCL_CACHE_DIR") or Path.home() / ".cache" / "pocl"
    os.environ["POCL_CACHE_DIR"] = str(Path(cache) / f"minillama-{WORKER}")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if time.time() > float(os.environ.get("TEST_UNTIL", "inf")):
        pytest.skip("the time for tests is over (TEST_UNTIL)")
