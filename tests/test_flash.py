"""A prompt's attention on tensor cores: which prompts it can do, and how its kernels are rendered. What comes out of
them only a GPU can say, or tinygrad's emulator."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from arrays import empty
from test_mma import SHARED, shared
from tinygrad import Tensor, dtypes

from minillama.kernels import attention, flash, long_attention
from minillama.kernels.flash_cells import FlashTiling, tiling
from minillama.kernels.rendering import programs


def attended(tokens: int, heads: int, kv_heads: int, dim: int, positions: int, cut: FlashTiling | None = None,
             ) -> Tensor:
    """Attention that nobody computes, for rendering."""
    cache = empty(positions, kv_heads, dim)
    return flash.attend(empty(tokens, heads, dim), cache, cache, (empty(tokens, 2 * heads * dim), dim), 2 * dim,
                        empty(1, dtype=dtypes.int32), cut)


@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "dim", "positions", "can"), (
    (512, 16, 2, 256, 17408, True), (8, 16, 2, 256, 4096, True), (64, 4, 2, 64, 4096, True), (32, 4, 1, 64, 256, True),
    (512, 16, 2, 256, 64, False), (20, 4, 2, 64, 4096, False), (64, 24, 4, 256, 4096, False),
    (64, 4, 2, 96, 4096, False), (64, 4, 2, 512, 4096, False), (64, 4, 2, 8, 4096, False)))
def test_attention_knows_which_prompts_it_can_cut_into_tiles(tokens, heads, kv_heads, dim, positions, can):
    """And every cut divides what it cuts, and has room."""
    cut = tiling(tokens, heads, kv_heads, dim, positions)
    assert flash.fits("CUDA", tokens, heads, kv_heads, dim, positions) is can is (cut is not None)
    assert not flash.fits("METAL", tokens, heads, kv_heads, dim, positions)
    if cut is None:
        with pytest.raises(ValueError, match="no tiles divide them$"):
            attended(tokens, heads, kv_heads, dim, positions)
        return
    share = heads // kv_heads
    assert tokens * share % cut.rows == 0 and cut.rows % 16 == 0 and cut.rows % share == 0
    assert dim % (8 * cut.warps) == 0 and cut.shared <= SHARED
    assert -(-positions // cut.size) >= 2 * cut.parts, "a loop of one tile does not exist"


@pytest.mark.parametrize(("shape", "cut"), (
    ((512, 16, 2, 256, 17408), None), ((512, 16, 2, 256, 17408), FlashTiling(64, 8, 1)), ((64, 4, 2, 64, 4096), None)))
def test_a_block_fits_into_shared_memory_and_reads_and_writes_whole_cells(shape, cut):
    tokens, heads, kv_heads, dim, positions = shape
    cut = cut or tiling(*shape)
    found = {re.search(r"flash_(queries|past|sum)?", one.source)[1]: one for one in programs(attended(*shape, cut))}
    kernel = found[None]
    assert kernel.threads == 32 * cut.warps and kernel.blocks == cut.parts * tokens * heads // cut.rows
    assert shared(kernel.source) == cut.shared <= SHARED
    steps, tiles = dim // 16, cut.rows // 16
    scores, sums = steps * 2, dim // 8                      # of 16 rows: a warp's products, but for those of halves
    assert kernel.source.count("= __WMMA_") == 3 * tiles * (scores + sums)
    loop = kernel.source[kernel.source.index("for (int"):]
    assert len(re.findall(r"uint4 val\d+ = ", loop)) == 2 * tiles * steps + scores + sums + 2 * tiles * cut.warps
    assert len(found["queries"].source.split("= make_uint4")) == 3      # high and low halves
    assert len(found["past"].source.split("= make_uint4")) == 1 + 2 * max(1, dim // 8 // 8)     # keys and values
    assert "return;" in found["past"].source, "all of the cache is read, however short the text"


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "positions", "can"), (
    (16, 2, 256, 16896, True), (16, 2, 256, 1024, False), (4, 2, 64, 4096, True), (16, 1, 256, 4096, False),
    (4, 4, 64, 4096, False), (4, 2, 32, 4096, False), (4, 2, 512, 4096, False), (6, 2, 96, 4096, False)))
def test_a_few_tokens_attend_over_a_long_cache_on_tensor_cores(heads, kv_heads, dim, positions, can):
    cache, q, position = empty(positions, kv_heads, dim), empty(2, heads, dim), empty(1, dtype=dtypes.int32)
    assert long_attention.fits("CUDA", heads, kv_heads, dim, positions) is can
    assert not long_attention.fits("METAL", heads, kv_heads, dim, positions)
    if not can:
        return
    y = attention.attend(q, cache, cache, (empty(2, 2 * heads * dim), dim), 2 * dim, position)
    kernel, total = programs(y)
    size = long_attention.size_of(dim)
    assert (kernel.threads, kernel.blocks) == (dim, 2 * kv_heads * -(-positions // size))
    assert shared(kernel.source) <= SHARED and "return;" in kernel.source and "attended_" in total.source
    assert kernel.source.count("= __WMMA_") == 3 * (dim // 32 + 2 * size // 16)     # two warps share keys
    for cache, loads in (("data3_", dim // 16), ("data4_", size // 4)):      # of a thread, each of four neighbours
        lines = [line for line in kernel.source.split("\n") if f"({cache}" in line]
        assert len(lines) == loads and all(line.startswith("  float4 val") for line in lines)


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(sys.version_info < (3, 12), reason="Python's own halves, which the emulator needs, came with 3.12")
def test_emulated_tensor_cores_give_what_the_twin_gives():
    command = [sys.executable, str(Path(__file__).parent / "emulated_flash.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"DEV": "PYTHON::sm_90"})
    assert done.returncode == 0, done.stderr[-2000:]
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 9 and max(errors) < 5e-6, errors
