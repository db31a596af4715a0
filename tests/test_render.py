"""Every kernel of every rung, rendered for GPUs that are not here: what Metal limits, and what CUDA must not miss."""
import json
import math
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from minillama.ladder import LADDER

pytestmark = [pytest.mark.host, pytest.mark.slow]

BUFFERS, SHARED_BYTES, THREADS = 31, 32 * 1024, 1024
SIZES = {"float": 4, "int": 4, "uint": 4, "half": 2, "ushort": 2, "short": 2, "bool": 1, "uchar": 1, "char": 1}
# Between them they hold the kernels of all rungs: capturing changes none, and a recurrence's prompt is a long graph.
REAL = "qwen3-next-80b-a3b"
STEPS = [("naive", 4), ("chunked", 64), ("gathered", 1), ("no-copies", 1), ("fused-projections", 64),
         ("fused-delta", 1), ("packed", 1), ("packed", 64), ("grouped", 1), ("grouped", 64)]


@cache
def rendered(backend: str, recipe: str, tokens: int, shape: str = "tiny") -> list[str]:
    command = [sys.executable, str(Path(__file__).parent / "render.py"), backend, recipe, str(tokens), shape]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("recipe", "tokens", "shape"), [(*step, "tiny") for step in STEPS] + [("grouped", 1, REAL)])
def test_metal_could_run_every_kernel(recipe, tokens, shape):
    sources = rendered("METAL", recipe, tokens, shape)
    assert len(sources) > 10
    for source in sources:
        name, arguments = re.search(r"kernel void (\w+)\((.*?)\)\s*\{", source, re.S).groups()
        buffers = len(re.findall(r"\bdevice\b|\bconstant\b", arguments))
        assert buffers <= BUFFERS, f"{name} takes {buffers} buffers"
        shared = sum(SIZES[kind] * int(count) for kind, count in
                     re.findall(r"threadgroup\s+(?:__attribute__\S+\s+)?(\w+)\s+\w+\[(\d+)\]", source))
        assert shared <= SHARED_BYTES, f"{name} shares {shared} bytes"
        threads = math.prod(int(size) for size in re.findall(r"lid\.\w; /\* (\d+) \*/", source))
        assert threads <= THREADS, f"{name} has {threads} threads in a group"
        assert "double" not in source, f"{name} uses float64"


def test_the_rungs_that_are_rendered_are_there():
    assert {name for name, _ in STEPS} <= {rung.name for rung in LADDER}


@pytest.mark.parametrize(("backend", "unit"), (("CUDA", "mma.sync"), ("METAL", "simdgroup_multiply_accumulate")))
def test_products_of_halves_use_the_units_for_them_and_read_what_lies_side_by_side_at_once(backend, unit):
    """Otherwise the compiler rounds each product of two halves to a half, and sums that: logits off by 0.05."""
    products = [source for source in rendered(backend, "grouped", 64, REAL)
                if re.search(r"(__global__|kernel) void .*?(halves_(tiles_)?Q|gemm_)", source)]
    assert len(products) >= 6
    assert sum(bool(re.search("gemm_(gated|mixed)|halves_tiles", source)) for source in products) >= 2
    for source in products:
        name = re.search(r"(halves|gemm)_\w+", source)[0]
        assert unit in source, name
        assert re.search(r"half4\*?\)", source), f"{name} reads x one half at a time"
    # and attention: with CUDA in a kernel of its own; else its two products are left to the optimizer (they reach over
    # so many positions), as is Metal's router
    flash = [source for source in rendered(backend, "grouped", 64, REAL) if re.search(r"void .*?flash_\d", source)]
    found = [source for source in rendered(backend, "grouped", 64, REAL) if unit in source and "tf32" not in source
             and not re.search("halves_|gemm_|flash_", source) and (backend == "CUDA" or "half" in source)]
    if backend == "CUDA":
        assert len(flash) == 1 and unit in flash[0] and not any("start" in source for source in found)
    else:
        assert not flash and sum("start" in source for source in found) == 2 and len(found) >= 3


@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python's own halves, which the emulator needs, came with 3.12")
@pytest.mark.parametrize("format", ("Q4_0", "Q8_0", "Q5_1", "F16"))
@pytest.mark.parametrize(("backend", "arch"), (("CUDA", "sm_90"), ("METAL", "METAL")))
def test_emulated_tensor_cores_give_the_twins_products(backend, arch, format):
    command = [sys.executable, str(Path(__file__).parent / "emulated.py"), backend, format]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DEV": f"PYTHON::{arch}"})
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.split()]
    few = 4 * (format != "F16")
    assert len(errors) == 3 + (3 + few) * (backend == "CUDA") and max(errors) < 5e-6, errors
