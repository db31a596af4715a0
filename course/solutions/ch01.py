"""Solutions of chapter 01's exercises."""
import numpy as np


def unpack_q8_0(blocks: np.ndarray) -> np.ndarray:
    """Two bytes of scale, then 32 signed bytes; a slice of columns must be copied before it can be read as halves."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)     # (n, 1)
    return scales * blocks[:, 2:].view(np.int8)                                     # (n, 32)


def pack_q4_0(values: np.ndarray) -> np.ndarray:
    """The value of largest size, sign and all, becomes quant 0, which stands for -8."""
    scale = values[np.abs(values).argmax()] / np.float32(-8)
    quants = np.clip(np.floor(values * (1 / scale) + np.float32(8.5)), 0, 15).astype(np.uint8)     # (32,)
    nibbles = quants[:16] | quants[16:] << 4                                        # (16,)
    return np.concatenate([np.array([scale], "<f2").view(np.uint8), nibbles])


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Adding half of what is cut off makes cutting round; one less where the last kept bit is 0: ties go to even."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def whole(raw: bytes) -> tuple[str, bytes]:
    """A character has at most four bytes, so at most three have to wait."""
    for cut in range(len(raw), max(len(raw) - 4, -1), -1):
        try:
            return raw[:cut].decode(), raw[cut:]
        except UnicodeDecodeError:
            continue
    return "", raw
