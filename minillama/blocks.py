"""Block formats: how a GGUF file packs values into blocks of a few bits each.

`unpack` works on whole tensors with numpy (`packers.pack` goes the other way). Each unpacker below is one format's
formula; layouts and order of operations are llama.cpp's (ggml/src/ggml-common.h, ggml-quants.c), so that the values
are the same to the last bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import numpy as np

MORE = {"Q4_K": 4, "Q5_K": 4}  # bytes that a block takes more on the device (`kernels/layouts.py`)
VALUES_AT_ONCE = 1 << 18  # unpacked or packed in one go: the intermediate arrays stay in the cache


@dataclass(frozen=True)
class Format:
    """One block format: `code` is ggml's number for it, `block` the values in a block, `size` a block's bytes."""

    name: str
    code: int
    block: int
    size: int

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor of that shape; its rows must be multiples of `block`."""
        return prod(shape) // self.block * self.size

    def device_bytes(self, shape: tuple[int, ...]) -> int:
        """The same on the device, packed."""
        return prod(shape) // self.block * (self.size + MORE.get(self.name, 0))


FORMATS = {
    name: Format(name, code, block, size)
    for name, code, block, size in (
        ("F32", 0, 1, 4),
        ("F16", 1, 1, 2),
        ("BF16", 30, 1, 2),
        ("Q8_0", 8, 32, 34),
        ("Q4_0", 2, 32, 18),
        ("Q4_1", 3, 32, 20),
        ("Q5_0", 6, 32, 22),
        ("Q5_1", 7, 32, 24),
        ("Q4_K", 12, 256, 144),
        ("Q5_K", 13, 256, 176),
        ("Q6_K", 14, 256, 210),
    )
}
BY_CODE = {fmt.code: fmt for fmt in FORMATS.values()}


def unpack(raw: np.ndarray, fmt: Format, shape: tuple[int, ...]) -> np.ndarray:
    """Raw bytes (nbytes,) uint8 of a tensor → its values, float32, of `shape`. Raises ValueError on a wrong size."""
    if raw.size != fmt.nbytes(shape) or shape[-1] % fmt.block:
        raise ValueError(f"{raw.size} bytes of {fmt.name} cannot fill shape {shape} ({fmt.nbytes(shape)} bytes)")
    blocks = raw.reshape(-1, fmt.size)
    values = np.empty((len(blocks), fmt.block), np.float32)
    step = max(1, VALUES_AT_ONCE // fmt.block)
    with np.errstate(invalid="ignore", over="ignore"):  # a damaged scale may be infinite
        for i in range(0, len(blocks), step):
            values[i : i + step] = UNPACKERS[fmt.name](blocks[i : i + step])
    return values.reshape(shape)


def _half(two_bytes: np.ndarray) -> np.ndarray:  # (blocks, 2) bytes → (blocks, 1) float32
    return np.ascontiguousarray(two_bytes).view("<f2").astype(np.float32)


def _nibbles(packed: np.ndarray, width: int) -> np.ndarray:
    """Bytes (blocks, n) → (blocks, 2n) values 0…15: of `width` bytes first the low halves, then the high ones."""
    groups = packed.reshape(len(packed), -1, 1, width)
    return np.concatenate((groups & 15, groups >> 4), axis=2).reshape(len(packed), -1)


def _fifth_bits(four_bytes: np.ndarray) -> np.ndarray:  # (blocks, 4) → (blocks, 32): 0 or 16
    return np.unpackbits(four_bytes, axis=1, bitorder="little") << 4


def _f32(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks).view("<f4")


def _bf16(blocks: np.ndarray) -> np.ndarray:  # the upper half of a float32
    return (np.ascontiguousarray(blocks).view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q8_0(blocks: np.ndarray) -> np.ndarray:  # scale 2, quants 32
    return _half(blocks[:, :2]) * blocks[:, 2:].view(np.int8).astype(np.float32)


def _q4_0(blocks: np.ndarray) -> np.ndarray:  # scale 2, nibbles 16
    return _half(blocks[:, :2]) * (_nibbles(blocks[:, 2:], 16).astype(np.float32) - 8)


def _q4_1(blocks: np.ndarray) -> np.ndarray:  # scale 2, minimum 2, nibbles 16
    return _half(blocks[:, :2]) * _nibbles(blocks[:, 4:], 16) + _half(blocks[:, 2:4])


def _q5_0(blocks: np.ndarray) -> np.ndarray:  # scale 2, fifth bits 4, nibbles 16
    quants = _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6])
    return _half(blocks[:, :2]) * (quants.astype(np.float32) - 16)


def _q5_1(blocks: np.ndarray) -> np.ndarray:  # scale 2, minimum 2, fifth bits 4, nibbles 16
    quants = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return _half(blocks[:, :2]) * quants + _half(blocks[:, 2:4])


def _six_bit_pairs(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The 12 bytes of a K block → scales (blocks, 8) and minima (blocks, 8), each 0…63.

    Bytes 0–3 hold scales 0–3 and bytes 4–7 minima 0–3 in their low 6 bits; bytes 8–11 hold the low 4 bits of scales
    and of minima 4–7, whose high 2 bits are the top bits of the first eight bytes.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((first & 63, (third & 15) | (first >> 6 << 4)), axis=1)
    minima = np.concatenate((second & 63, (third >> 4) | (second >> 6 << 4)), axis=1)
    return scales, minima


def _scaled_by_32(blocks: np.ndarray, quants: np.ndarray) -> np.ndarray:
    """Quants (blocks, 256) · scale − minimum, both given per 32 values as 6 bits of the block's two halves."""
    scales, minima = _six_bit_pairs(blocks[:, 4:16])
    scales = (_half(blocks[:, :2]) * scales)[:, :, None]  # (blocks, 8, 1)
    minima = (_half(blocks[:, 2:4]) * minima)[:, :, None]
    return (scales * quants.reshape(-1, 8, 32) - minima).reshape(-1, 256)


def _q4_k(blocks: np.ndarray) -> np.ndarray:  # scale 2, scale of minima 2, pairs 12, nibbles 128
    return _scaled_by_32(blocks, _nibbles(blocks[:, 16:], 32))


def _q5_k(blocks: np.ndarray) -> np.ndarray:  # scale 2, scale of minima 2, pairs 12, fifth bits 32, nibbles 128
    bits = np.unpackbits(blocks[:, 16:48, None], axis=2, bitorder="little")  # (blocks, 32 values, 8 groups)
    fifth = bits.transpose(0, 2, 1).reshape(-1, 256) << 4
    return _scaled_by_32(blocks, _nibbles(blocks[:, 48:], 32) | fifth)


def _q6_k(blocks: np.ndarray) -> np.ndarray:  # nibbles 128, upper bit pairs 64, scales of 16 values 16, scale 2
    pairs = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8)[:, None]
    quants = _nibbles(blocks[:, :128], 64) | ((pairs & 3) << 4).reshape(-1, 256)  # 0…63
    scales = _half(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)  # (blocks, 16)
    return (scales[:, :, None] * (quants.astype(np.float32) - 32).reshape(-1, 16, 16)).reshape(-1, 256)


UNPACKERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "F32": _f32,
    "F16": _half,
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
