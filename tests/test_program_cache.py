"""Lowered kernels are found again by the next process."""
import os
import subprocess
import sys

from tinygrad import dtypes
from tinygrad.uop.ops import UOp

from minillama.kernels.block import const
from minillama.program_cache import largest

SCRIPT = """
from minillama import program_cache
program_cache.install()
from tinygrad import Tensor, codegen
from tinygrad.engine import realize
lowered = []
original = realize.to_program
def counted(*args):
    lowered.append(args)
    return original(*args)
realize.to_program = counted
print((Tensor([1.0, 2.0, 3.0]) * 7 + 0.125).tolist(), len(lowered))
"""


def test_a_second_process_lowers_nothing_and_computes_the_same(tmp_path):
    settings = os.environ | {"CACHEDB": str(tmp_path / "cache.db"), "PARALLEL": "0"}
    command = [sys.executable, "-c", SCRIPT]
    said = [subprocess.run(command, env=settings, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    values = "[7.125, 14.125, 21.125]"
    assert said[0].startswith(values) and not said[0].endswith(" 0\n"), said
    assert said[1] == f"{values} 0\n", said


def test_a_count_of_what_is_loaded_is_bounded_however_deep_its_sum():
    loaded = UOp.placeholder((4,), dtypes.int32, 0).index(const(1)).load() & 1
    count = loaded
    for _ in range(3000):
        count = count + loaded
    assert largest(count) == 3001 and largest(7) == 7
