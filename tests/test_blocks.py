"""Block formats against the `gguf` package, whose conversions were checked against llama.cpp's own."""

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minillama.blocks import BY_CODE, FORMATS, unpack
from minillama.packers import pack

pytestmark = pytest.mark.host

SIMPLE = [name for name in FORMATS if not name.endswith("_K")]
K_FORMATS = [name for name in FORMATS if name.endswith("_K")]
SCALES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2]}
SCALES["Q6_K"] = [208]  # byte offsets of a block's half-precision scales
HALVES = [0x0000, 0x8000, 0x0001, 0x83FF, 0x0400, 0x3C00, 0x7BFF, 0xFBFF]  # ±0, subnormal, smallest normal, 1, largest
ROW = 512  # values: a multiple of every block


def judged(raw: np.ndarray, name: str) -> np.ndarray:
    """What the `gguf` package makes of the bytes."""
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(raw.reshape(1, -1), gguf.GGMLQuantizationType[name]).reshape(-1)


def rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Values of many sizes from row to row, with rows of zeros, constants, tiny values, values of one sign."""
    sizes = np.exp(4 * rng.standard_normal((count, 1)))
    values = rng.standard_normal((count, ROW)) * np.minimum(sizes, 5000)
    values[0], values[1], values[2] = 0, 2.5, -0.75
    values[3] *= 1e-30
    values[4] = np.abs(values[4])
    values[5] = -np.abs(values[5])
    values[6, ROW // 3 :] = 0
    return values.astype(np.float32)


def test_formats_are_those_of_the_gguf_package():
    for name, fmt in FORMATS.items():
        code = gguf.GGMLQuantizationType[name]
        assert (fmt.code, fmt.block, fmt.size) == (code.value, *gguf.GGML_QUANT_SIZES[code]), name
        assert BY_CODE[code.value] is fmt


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), scales=st.lists(st.sampled_from(HALVES), min_size=2, max_size=2))
def test_unpacked_values_equal_the_gguf_package_to_the_bit(name: str, seed: int, scales: list[int]):
    fmt = FORMATS[name]
    blocks = np.random.default_rng(seed).integers(0, 256, (2 * ROW // fmt.block, fmt.size), np.uint8)
    for block in (0, 1):
        for i in SCALES.get(name, []):
            blocks[block, i : i + 2] = np.array([scales[block]], "<u2").view(np.uint8)
    ours, theirs = unpack(blocks.reshape(-1), fmt, (2, ROW)).reshape(-1), judged(blocks, name)
    wrong = np.flatnonzero(ours.view(np.uint32) != theirs.view(np.uint32))
    assert wrong.size == 0, f"{name}: value {wrong[0]} is {ours[wrong[0]]}, the judge says {theirs[wrong[0]]}"


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_packed_bytes_of_simple_formats_equal_the_gguf_package(name: str, seed: int):
    values = rows(np.random.default_rng(seed), 8)
    ours = pack(values, FORMATS[name])
    with np.errstate(all="ignore"):
        theirs = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name]).reshape(-1).view(np.uint8)
    wrong = np.flatnonzero(ours != theirs)
    assert wrong.size == 0, f"{name}: {wrong.size} bytes differ, first byte {wrong[:1]} of block {FORMATS[name].size}"


@pytest.mark.parametrize(("name", "steps", "largest"), [("Q4_K", 15, 945), ("Q5_K", 31, 1953), ("Q6_K", 63, 4096)])
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_packed_k_formats_stay_near_a_step_of_the_block_range(name: str, steps: int, largest: int, seed: int):
    """A step is the range of 256 values divided by the levels: coarser than any scale that the search should choose.

    What rounding the half-precision scale costs comes on top: half its smallest step times its `largest` multiple.
    """
    values = rows(np.random.default_rng(seed), 8)
    error = np.abs(unpack(pack(values, FORMATS[name]), FORMATS[name], values.shape) - values).reshape(-1, 256)
    span = np.ptp(np.concatenate((values.reshape(-1, 256), np.zeros((16, 1), np.float32)), axis=1), axis=1)
    if name == "Q6_K":  # symmetric about zero
        span = 2 * np.abs(values.reshape(-1, 256)).max(axis=1)
    bound = 1.5 * span / steps + 2.0**-25 * largest
    assert (error.max(axis=1) <= bound).all(), f"{name}: errors {error.max(axis=1)}, bounds {bound}"


@pytest.mark.parametrize(("name", "bigger"), [("Q4_K", "Q4_1"), ("Q5_K", "Q5_1")])
def test_k_formats_lose_less_than_the_simple_format_of_more_bits(name: str, bigger: str):
    values = np.random.default_rng(1).standard_normal((64, 1024)).astype(np.float32)
    errors = {}
    for fmt in (FORMATS[name], FORMATS[bigger]):
        errors[fmt.name] = np.square(unpack(pack(values, fmt), fmt, values.shape) - values).mean()
    assert errors[name] < 0.95 * errors[bigger], f"mean squared errors {errors}"


@pytest.mark.parametrize("name", K_FORMATS)
def test_packing_unpacked_k_blocks_again_changes_little(name: str):
    fmt = FORMATS[name]
    values = np.random.default_rng(2).standard_normal((32, 1024)).astype(np.float32)
    once = unpack(pack(values, fmt), fmt, values.shape)
    twice = unpack(pack(once, fmt), fmt, values.shape)
    drift, loss = np.abs(twice - once).mean(), np.abs(once - values).mean()
    assert drift < loss / 2, f"{name}: mean change {drift:.2e} the second time, {loss:.2e} the first"


def test_wrong_sizes_are_refused():
    fmt = FORMATS["Q4_0"]
    with pytest.raises(ValueError, match="18 bytes of Q4_0 cannot fill"):
        unpack(np.zeros(18, np.uint8), fmt, (2, 32))
    with pytest.raises(ValueError, match="cannot fill"):
        unpack(np.zeros(18, np.uint8), fmt, (2, 16))  # as many values, but rows cut a block in two
    with pytest.raises(ValueError, match="not a multiple"):
        pack(np.zeros((2, 16), np.float32), fmt)
