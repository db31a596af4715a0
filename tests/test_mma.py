"""Products for a few tokens on tensor cores: what goes into them, and how much memory a block wants. (What comes
out of them only a GPU can say, or tinygrad's emulator: see test_render.py; and `judge.py` on a GPU.)"""
import re

import numpy as np
import pytest
from arrays import TOLERANCE, empty, off, packed, tensor, threads_share, unfilled
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels import mma, norm, product, tuning
from minillama.kernels.layouts import LAYOUTS, OCTET
from minillama.kernels.rendering import sources

QUANTS = [name for name, layout in LAYOUTS.items() if layout.block > 1]
SHARED = 48 * 1024      # bytes that a block can have without asking


def shared(source: str) -> int:
    """Bytes that a rendered kernel's blocks share."""
    sizes = {"half": 2, "float": 4, "uint": 4}
    rooms = re.findall(r"__shared__ __align__\(16\) (\w+) \w+\[(\d+)\]", source)
    return sum(sizes[kind] * int(count) for kind, count in rooms)


@pytest.mark.parametrize("format", QUANTS)
def test_pairs_of_quants_are_the_quants_as_halves_would_hold_them(format):
    """As bits: a half below 2^-14 is its bits times 2^-24."""
    weight, octets = packed(format, 8, 512), 512 // OCTET

    def kernel(words: UOp, quants: UOp, *arrays: UOp) -> UOp:
        row, i = UOp.range(8, 0), UOp.range(octets, 1)
        octet = weight.layout.octet(*arrays, row, i)
        stores = [words.index(row, i * 4 + n).store(pair.word) for n, pair in enumerate(octet.pairs())]
        stores += [quants.index(row, i * OCTET + n).store(quant) for n, quant in enumerate(octet.quants)]
        return UOp.group(*stores).end(row, i).sink(arg=KernelInfo("pairs"))
    words = Tensor.empty(8, octets * 4, dtype=dtypes.uint32)
    words, quants = words.custom_kernel(Tensor.empty(8, 512), *weight.arrays, fxn=kernel)[:2]
    Tensor.realize(words, quants)
    bits, pairs = int(np.log2(quants.numpy().max())), mma.order(weight.layout)
    numbers = (quants.numpy().reshape(8, octets, OCTET) - 2 ** bits).astype(np.uint32)
    assert sorted(place for pair in pairs for place in (pair.first, pair.second)) == list(range(OCTET))
    assert all(0 <= pair.power and bits + pair.power <= 10 for pair in pairs)
    want = np.stack([(numbers[..., p.first] | numbers[..., p.second] << 16) << p.power for p in pairs], axis=-1)
    assert np.array_equal(words.numpy().reshape(8, octets, 4), want)


def test_only_quants_that_lie_alike_are_multiplied_with_the_same_x():
    assert mma.fits(LAYOUTS["Q4_0"], LAYOUTS["Q6_K"], LAYOUTS["Q5_1"]) and mma.fits(LAYOUTS["Q8_0"])
    assert not mma.fits(LAYOUTS["Q4_0"], LAYOUTS["Q8_0"])
    assert not any(mma.fits(LAYOUTS[name]) for name in ("F32", "F16", "BF16"))


@pytest.mark.parametrize("format", ("Q4_0", "Q6_K", "Q8_0"))
@pytest.mark.parametrize(("rows", "columns"), ((12352, 2048), (2048, 4096), (512, 256), (4096, 8192), (12288, 8192)))
@pytest.mark.parametrize("tokens", (1, 2, 3, 8, 16))
def test_products_for_a_few_tokens_use_tensor_cores_and_fit_into_shared_memory(format, rows, columns, tokens):
    x = product.Normed(empty(tokens, columns), empty(columns), 1e-6)
    weight = unfilled(format, rows, columns)
    source = sources(product.linear(x, weight))[0]
    assert shared(source) <= SHARED
    if (cut := tuning.mma_tiling("CUDA", rows, columns, tokens)) is None:
        assert columns == 8192 and "mma.sync" not in source     # too much for a block
        return
    # a unit takes 16 rows, 16 terms and one token, with x in two parts
    units = rows // 16 * columns // 16 * min(tokens, cut.tokens) // (rows // (16 * cut.each) * cut.warps)
    assert source.count("= __WMMA_") == units and "mma.sync.aligned.m16n8k16" in source


@pytest.mark.parametrize(("used", "width", "units"), ((10, 512, True), (8, 1024, True), (10, 1024, False),
                                                      (8, 2048, False), (2, 2048, True)))
def test_sums_over_experts_use_tensor_cores_where_a_block_has_room_for_all_vectors(used, width, units):
    down, shared_down = unfilled("Q4_0", 16, 512, width), unfilled("Q4_0", 512, width)
    source = sources(product.mixed(empty(1, used, width), down, empty(1, used, dtype=dtypes.int32), empty(1, 512),
                                   (empty(1, width), shared_down)))[0]
    assert ("mma.sync" in source) is units and shared(source) <= SHARED


def test_tensor_cores_that_add_up_other_numbers_of_terms_are_left_alone(monkeypatch):
    """Turing's take eight."""
    monkeypatch.setattr(tuning, "has_tensor_cores", lambda device, terms=0: terms in (0, 8))
    assert tuning.mma_tiling("CUDA", 2048, 2048, 1) is None


@pytest.mark.parametrize("tokens", (1, 3))
def test_a_norm_that_kernels_take_equals_one_taken_before(tokens, monkeypatch):
    threads_share(monkeypatch)
    x = product.Normed((tensor(tokens, 256) * 3).realize(), tensor(256, seed=1), 1e-6)
    want_x = norm.rms_norm_twin(x.x, x.weight, x.eps)
    gate, up, weight = (packed("Q4_0", 64, 256, seed=seed) for seed in range(3))
    residual, share = tensor(tokens, 64), (tensor(256, seed=2) / 16).realize()
    got, want = product.linear(x, weight, residual), product.linear_twin(want_x, weight, residual)
    assert off(got, want) < TOLERANCE
    first, normed = product.shared_gated(x, gate, up, share)
    Tensor.realize(first, normed)
    assert off(first, product.shared_gated_twin(want_x, gate, up, share)) < TOLERANCE
    assert off(normed, want_x) < TOLERANCE
