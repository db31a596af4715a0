"""Packers: from float values to the blocks that `blocks.py` unpacks, with numpy and nothing else.

`pack` works on whole tensors. A packer takes blocks (blocks, values) float32 and returns (blocks, bytes) uint8. The
simple formats round to nearest, bit for bit as the `gguf` package does. The K formats hold one scale for every 16 or
32 values and are searched for the scales of least weighted squared error: the search of llama.cpp's
`quantize_row_q{4,5,6}_K_ref`, all blocks at once.
"""

from collections.abc import Callable

import numpy as np

from minillama.blocks import VALUES_AT_ONCE, Format

TINY = 1e-15  # below this a group of values counts as zero
SMALL = 1e-6  # relative: a difference below this is float32's rounding


def _bytes_of_half(values: np.ndarray) -> np.ndarray:  # (blocks, n) → (blocks, 2n) bytes
    return np.ascontiguousarray(values).astype("<f2").view(np.uint8)


def _inverse(scale: np.ndarray) -> np.ndarray:
    return np.where(scale == 0, 0, 1 / scale)


def _floor_to_bytes(values: np.ndarray, highest: int) -> np.ndarray:
    return np.trunc(values, dtype=np.float32).astype(np.uint8).clip(0, highest)


def _pack_nibbles(quants: np.ndarray, width: int) -> np.ndarray:
    """Quants (blocks, n) → bytes (blocks, n/2): of every 2·`width`, the first half low, the second half high."""
    groups = quants.reshape(len(quants), -1, 2, width)
    return ((groups[:, :, 0] & 15) | (groups[:, :, 1] << 4)).reshape(len(quants), -1)


def _pack_fifth_bits(quants: np.ndarray) -> np.ndarray:  # (blocks, 32) → (blocks, 4)
    return np.packbits(quants >> 4, axis=1, bitorder="little")


def _f32(blocks: np.ndarray) -> np.ndarray:
    return blocks.astype("<f4").view(np.uint8)


def _bf16(blocks: np.ndarray) -> np.ndarray:
    """The upper half of each float32, rounded to nearest even; a NaN stays one."""
    bits = blocks.view(np.uint32).astype(np.uint64)
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    bits = np.where(nan, (bits & 0xFFFF0000) | 0x400000, bits)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(np.uint8)


def _q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    scaled = blocks * _inverse(scale)
    size = np.abs(scaled)
    quants = np.sign(scaled) * (np.floor(size) + np.floor(2 * (size - np.floor(size))))  # halves away from zero
    return np.concatenate((_bytes_of_half(scale), quants.astype(np.int8).view(np.uint8)), axis=1)


def _symmetric(blocks: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale (blocks, 1) and quants 0…2·levels−1 such that the value of largest size, sign and all, becomes −levels."""
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1, keepdims=True), axis=1)
    scale = largest / -levels
    return scale, _floor_to_bytes(blocks * _inverse(scale) + np.float32(levels + 0.5), 2 * levels - 1)


def _from_minimum(blocks: np.ndarray, highest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scale (blocks, 1), minimum (blocks, 1) and quants 0…highest that cover the block's range."""
    minimum = blocks.min(axis=1, keepdims=True)
    scale = (blocks.max(axis=1, keepdims=True) - minimum) / highest
    return scale, minimum, _floor_to_bytes((blocks - minimum) * _inverse(scale) + np.float32(0.5), highest)


def _q4_0(blocks: np.ndarray) -> np.ndarray:
    scale, quants = _symmetric(blocks, 8)
    return np.concatenate((_bytes_of_half(scale), _pack_nibbles(quants, 16)), axis=1)


def _q4_1(blocks: np.ndarray) -> np.ndarray:
    scale, minimum, quants = _from_minimum(blocks, 15)
    return np.concatenate((_bytes_of_half(scale), _bytes_of_half(minimum), _pack_nibbles(quants, 16)), axis=1)


def _q5_0(blocks: np.ndarray) -> np.ndarray:
    scale, quants = _symmetric(blocks, 16)
    return np.concatenate((_bytes_of_half(scale), _pack_fifth_bits(quants), _pack_nibbles(quants, 16)), axis=1)


def _q5_1(blocks: np.ndarray) -> np.ndarray:
    scale, minimum, quants = _from_minimum(blocks, 31)
    head = (_bytes_of_half(scale), _bytes_of_half(minimum))
    return np.concatenate((*head, _pack_fifth_bits(quants), _pack_nibbles(quants, 16)), axis=1)


def _search_scale_and_minimum(x: np.ndarray, highest: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale s and minimum m ≤ 0, (groups,) each, for which s·quant + m is near x (groups, 32), quants 0…highest.

    Each step rounds x with another trial scale, and solves for the s and m that fit those quants best (weighted least
    squares); the step of least error wins. The weights favour large values. llama.cpp: `make_qkx2_quants`.
    """
    w = np.abs(x) + np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    low = np.minimum(x.min(axis=1), 0)
    span = x.max(axis=1) - low
    inverse = _inverse(span)
    offset = x - low[:, None]  # (groups, 32), from 0 to span
    sum_w, sum_x, sum_xx = w.sum(axis=1), _dot(w, x), np.einsum("gi,gi,gi->g", w, x, x)
    best_scale, best_minimum, best_error = span / highest, low, np.full(len(x), np.inf, np.float32)
    for step in steps.astype(np.float32):
        q = np.rint(offset * ((highest + step) * inverse)[:, None]).clip(0, highest)
        wq = w * q
        sum_q, sum_qq, sum_xq = wq.sum(axis=1), _dot(wq, q), _dot(wq, x)
        det = sum_w * sum_qq - sum_q * sum_q
        scale = (sum_w * sum_xq - sum_x * sum_q) / det
        minimum = (sum_qq * sum_x - sum_q * sum_xq) / det
        above = minimum > 0
        scale, minimum = np.where(above, sum_xq / sum_qq, scale), np.where(above, 0, minimum)
        error = sum_xx + scale * (scale * sum_qq - 2 * sum_xq)
        error += minimum * (minimum * sum_w + 2 * (scale * sum_q - sum_x))
        better = (det > SMALL * sum_w * sum_qq) & (error < best_error)  # no line fits where all quants are equal
        best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum, best_minimum)
        best_error = np.where(better, error, best_error)
    return best_scale, best_minimum


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:  # row by row
    return np.einsum("gi,gi->g", a, b)


def _six_bits(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values ≥ 0 (blocks, 8) → their quants 0…63 and the half-precision scale (blocks, 1) that undoes it."""
    largest = values.max(axis=1, keepdims=True)
    quants = np.rint(values * (63 * _inverse(largest))).clip(0, 63)
    return quants.astype(np.uint8), (largest / 63).astype(np.float16)


def _pack_six_bit_pairs(scales: np.ndarray, minima: np.ndarray) -> np.ndarray:
    """Scales and minima (blocks, 8), each 0…63 → 12 bytes; see `blocks._six_bit_pairs`."""
    first = scales[:, :4] | (scales[:, 4:] >> 4 << 6)
    second = minima[:, :4] | (minima[:, 4:] >> 4 << 6)
    return np.concatenate((first, second, (scales[:, 4:] & 15) | (minima[:, 4:] << 4)), axis=1)


def _scale_by_32(blocks: np.ndarray, highest: int, steps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The first 16 bytes of Q4_K and Q5_K blocks, and quants (blocks, 256) 0…highest."""
    x = blocks.reshape(-1, 32)
    scale, minimum = (part.reshape(-1, 8) for part in _search_scale_and_minimum(x, highest, steps))
    (scales, d), (minima, d_min) = _six_bits(scale), _six_bits(-minimum)
    unit = (d.astype(np.float32) * scales).reshape(-1, 1)
    quants = (x + (d_min.astype(np.float32) * minima).reshape(-1, 1)) * _inverse(unit)
    head = np.concatenate((_bytes_of_half(d), _bytes_of_half(d_min), _pack_six_bit_pairs(scales, minima)), axis=1)
    return head, np.rint(quants).clip(0, highest).astype(np.uint8).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:
    head, quants = _scale_by_32(blocks, 15, np.linspace(-1, 1, 21))
    return np.concatenate((head, _pack_nibbles(quants, 32)), axis=1)


def _q5_k(blocks: np.ndarray) -> np.ndarray:
    head, quants = _scale_by_32(blocks, 31, np.linspace(-0.5, 1, 16))
    fifth = (quants >> 4).reshape(-1, 8, 32).transpose(0, 2, 1)  # bit j of byte i: value i of group j
    fifth = np.packbits(fifth, axis=2, bitorder="little")[:, :, 0]
    return np.concatenate((head, fifth, _pack_nibbles(quants, 32)), axis=1)


def _search_scale(x: np.ndarray, levels: int) -> np.ndarray:
    """The scale (groups,) for which scale·quant is nearest to x (groups, 16), quants −levels…levels−1, weights x².

    For given quants the best scale is Σwxq / Σwq², and leaves the least error where (Σwxq)² / Σwq² is largest.
    llama.cpp: `make_qx_quants`.
    """
    largest = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    w = np.square(x)
    wx = w * x
    best_scale, best_gain = np.zeros(len(x), np.float32), np.zeros(len(x), np.float32)
    for step in np.linspace(-0.9, 0.9, 19, dtype=np.float32):
        q = np.rint(x * (-(levels + step) * _inverse(largest))).clip(-levels, levels - 1)
        sum_xq, sum_qq = _dot(wx, q), np.einsum("gi,gi,gi->g", w, q, q)
        scale = sum_xq * _inverse(sum_qq)
        better = scale * sum_xq > best_gain
        best_scale = np.where(better, scale, best_scale)
        best_gain = np.where(better, scale * sum_xq, best_gain)
    return np.where(np.abs(largest[:, 0]) < TINY, 0, best_scale)


def _q6_k(blocks: np.ndarray) -> np.ndarray:
    x = blocks.reshape(-1, 16)
    scale = _search_scale(x, 32).reshape(-1, 16)
    largest = np.take_along_axis(scale, np.abs(scale).argmax(axis=1, keepdims=True), axis=1)
    d = (largest / -128).astype(np.float16)
    scales = np.rint(scale * (-128 * _inverse(largest))).clip(-128, 127).astype(np.int8)
    unit = (d.astype(np.float32) * scales).reshape(-1, 1)
    quants = (np.rint(x * _inverse(unit)).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    upper = quants >> 4
    upper = upper[:, :, 0] | (upper[:, :, 1] << 2) | (upper[:, :, 2] << 4) | (upper[:, :, 3] << 6)  # (blocks, 2, 32)
    lower = _pack_nibbles(quants.reshape(-1, 256), 64)
    return np.concatenate((lower, upper.reshape(-1, 64), scales.view(np.uint8), _bytes_of_half(d)), axis=1)


PACKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _bytes_of_half,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


def pack(values: np.ndarray, fmt: Format) -> np.ndarray:
    """Values of any shape whose rows are multiples of `fmt.block` → raw bytes (nbytes,) uint8."""
    if values.shape[-1] % fmt.block:
        raise ValueError(f"rows of {values.shape[-1]} values are not a multiple of {fmt.name}'s {fmt.block}")
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, fmt.block)
    raw = np.empty((len(blocks), fmt.size), np.uint8)
    step = max(1, VALUES_AT_ONCE // fmt.block)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for i in range(0, len(blocks), step):
            raw[i : i + step] = PACKERS[fmt.name](blocks[i : i + step])
    return raw.reshape(-1)
