"""A prompt's products in tiles: what goes into them, how much memory a block wants, what its threads copy. (What comes
out of tensor cores only a GPU can say, or tinygrad's emulator: see test_render.py; and `judge.py` on a GPU.)"""
import re

import numpy as np
import pytest
from arrays import TOLERANCE, empty, numbers, off, packed, tensor, unfilled
from test_mma import SHARED, shared
from tinygrad import Device, Tensor, dtypes

from minillama.delta_net import causal_conv
from minillama.kernels import conv, gemm, gemm_experts, groups, halves, router
from minillama.kernels.gemm_tuning import GemmTiling
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.rendering import sources


def split(tokens: int, columns: int) -> halves.Halves:
    """Halves that nobody fills, for rendering."""
    return halves.Halves(empty(tokens, 2 * columns, dtype=dtypes.half), empty(tokens, columns // halves.SUMMED))


@pytest.mark.parametrize("format", ("Q4_0", "Q8_0", "F32"))
def test_halves_and_sums_are_those_of_x(format):
    """To 22 bits, or to 2^-27. (PoCL takes subnormal halves for zero.)"""
    least = 2.0 ** (-27 if Device.DEFAULT == "CPU" else -17)
    x, layout = numbers(24, 128) * 10.0 ** np.arange(-6, 6).repeat(2)[:, None], LAYOUTS[format]
    made = halves.halves(Tensor(x.astype(np.float32)).realize(), layout)
    parts = made.parts.numpy().astype(np.float64).reshape(24, 4, 2, 4, 4, 2)     # row, span, part, octet, pair, place
    found = np.zeros((24, 4, 4, 8))
    for n, pair in enumerate(halves.order(layout)):
        for k, place in enumerate((pair.first, pair.second)):
            value = parts[:, :, 0, :, n, k] + parts[:, :, 1, :, n, k] / 2048
            found[..., place] = value * 2.0 ** (pair.power + 4)
    assert np.all(np.abs(found.reshape(24, 128) - x) <= np.maximum(np.abs(x) * 2.0 ** -21, least))
    want = x.reshape(24, -1, 16).sum(-1) / halves.QUANT
    assert np.allclose(made.sums.numpy(), want, rtol=1e-5, atol=np.abs(want).max(-1, keepdims=True) * 1e-5)


def test_matrices_of_every_format_can_be_multiplied_and_those_in_one_order_with_the_same_x():
    assert all(halves.fits(unfilled(name, 64, 256)) for name in LAYOUTS)
    assert halves.fits(unfilled("Q4_K", 64, 256), unfilled("Q6_K", 64, 256))
    assert not halves.fits(unfilled("Q4_0", 64, 256), unfilled("Q8_0", 64, 256))
    assert not halves.fits(unfilled("Q4_0", 64, 96))                # no whole stages
    assert not halves.fits(unfilled("Q4_0", 1, 256))


@pytest.mark.parametrize("format", LAYOUTS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), ((512, 2080, 512), (24, 96, 256)))
def test_products_fit_into_shared_memory_and_use_tensor_cores(format, tokens, rows, columns):
    weight = unfilled(format, rows, columns)
    source = sources(gemm.linear(split(tokens, columns), weight, empty(tokens, rows)))[-1]
    cut = gemm.tiling(tokens, rows, weight)
    assert shared(source) <= SHARED and tokens % cut.tokens == 0
    products = 3 if format in ("F32", "BF16") else 4 if format == "Q6_K" else 2     # of a tile and 16 columns
    assert source.count("= __WMMA_") == cut.each * cut.columns * (halves.STAGE // 16) * products
    # a loop's copies come before what it reads, behind the barrier that frees their room
    loop = source[source.index("for (int"):]
    places = [loop.index(text) for text in ("wait_group", "__syncthreads", "cp.async.c", "commit_group", "= __WMMA_")]
    assert places == sorted(places)
    assert re.search(r"half4 val\d+ = ", loop), "reads x one half at a time"


@pytest.mark.parametrize("format", ("Q4_0", "Q8_0", "Q4_K", "Q6_K", "F16"))
@pytest.mark.parametrize("tile", (8, 16))
def test_experts_fit_into_shared_memory_and_pass_over_tiles_that_nobody_fills(format, tile):
    experts, width, hidden, used, tokens = 4, 512, 256, 2, 64
    gate, up = (unfilled(format, experts, width, hidden) for _ in range(2))
    down, count = unfilled(format, experts, hidden, width), groups.tiles_for(tokens * used, experts, tile)
    tiles = gemm_experts.Tiles(tile, empty(count, dtype=dtypes.int32), empty(count * tile, dtype=dtypes.int32), used)
    h = gemm_experts.gated(split(tokens, hidden), gate, up, down.layout, empty(tokens * used), tiles)
    first, second = sources(h.parts)[-1], sources(gemm_experts.mixed(split(count * tile, width), down, tiles))[-1]
    for source in (first, second):
        assert shared(source) <= SHARED
        bound = re.search(r"for \(int \w+ = 0; \w+ < (.+); ", source)[1]
        bound = re.search(rf"int {bound} = (.+);", source)[1] if bound.isidentifier() else bound
        assert "?0:" in bound, "the loop's length does not depend on the tile"
    alone = gemm_experts.gated(split(tokens, hidden), unfilled(format, width, hidden), unfilled(format, width, hidden),
                               LAYOUTS[format], empty(tokens))
    assert shared(sources(alone.parts)[-1]) <= SHARED


def test_threads_share_what_a_block_copies():
    """Every row and item is somebody's."""
    block = gemm.Block(GemmTiling(2, 2, 2, 2, 2), "CUDA")
    ranges = block.ranges
    for rows, items in ((64, 16), (32, 1), (64, 2), (8, 4)):
        seen = set()
        for thread in range(128):
            lane, down, across = thread % 32, thread // 64, thread // 32 % 2
            for at in block.shares(rows, items):
                seen.add(tuple(int(one.substitute(dict(zip(ranges, (r.const_like(v) for r, v in zip(
                    ranges, (lane, down, across), strict=True)), strict=True))).simplify().val) for one in at))
        assert seen == {(row, item) for row in range(rows) for item in range(items)}


def test_a_tile_with_one_stage_has_no_loop():
    """tinygrad 0.14 knows none that runs once or not at all."""
    down = unfilled("Q4_0", 4, 128, 64)
    tiles = gemm_experts.Tiles(16, empty(5, dtype=dtypes.int32), empty(80, dtype=dtypes.int32), 2)
    assert "for (int" not in sources(gemm_experts.mixed(split(80, 64), down, tiles))[-1]


@pytest.mark.parametrize("experts", (1, 7, 12))
def test_any_number_of_experts_can_be_ranked_for_a_prompt(experts):
    assert "route_32_1" in sources(router.choose(empty(32, experts), 1)[0])[-1]


@pytest.mark.parametrize(("tokens", "first"), ((16, 0), (24, 8)))
def test_the_convolution_equals_its_twin(tokens, first):
    y, window, weight = tensor(tokens, 80), tensor(3, 64, seed=1), tensor(64, 4, seed=2)
    got, _ = conv.conv((y, first), window, weight)
    assert off(got, causal_conv(window.cat(y[:, first:first + 64], dim=0), weight)) < TOLERANCE


def test_tensor_cores_do_not_exist_here_but_products_of_packed_weights_do():
    """On a device without them a prompt's product takes the other way."""
    from minillama.layers import linear
    x, weight = tensor(32, 256), packed("Q4_0", 64, 256)
    assert off(linear(x, weight), x @ weight.values().T) < TOLERANCE
