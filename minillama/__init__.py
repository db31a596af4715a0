"""minillama: a Qwen3-Next inference engine in tinygrad, small enough to read in an evening.

Importing the package does one thing: where there is no C compiler on the path and `make` has put one into the
environment, it tells tinygrad about it (tinygrad's CPU device compiles every kernel with clang).
"""
import os
import shutil
import sys
from pathlib import Path

__version__ = "0.1.0"

_own_clang = Path(sys.prefix) / "bin" / "clang"
if "CC" not in os.environ and not shutil.which("clang") and _own_clang.exists():
    os.environ["CC"] = str(_own_clang)
