"""Checks of chapter 12's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from checks import examine, expects
from checks.kernels import NotAKernel, checked
from minillama.blocks import FORMATS, unpack
from minillama.kernels.packed import Packed
from minillama.packers import pack

Q8_0 = FORMATS["Q8_0"]


def _blocks(rows: int, columns: int, scale: float = 1.0) -> np.ndarray:
    """Random Q8_0 blocks of a matrix, (rows * columns / 32, 34) uint8."""
    values = np.random.default_rng(rows).standard_normal((rows, columns)).astype(np.float32) * np.float32(scale)
    return pack(values, Q8_0).reshape(-1, Q8_0.size)


def _packed(blocks: np.ndarray, rows: int, columns: int) -> Packed:
    return Packed.from_bytes(Tensor(blocks.reshape(rows, -1)), "Q8_0", (rows, columns))


def check_repack_q8_0(yours: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]) -> bool:
    """(blocks (n, 34) uint8) -> words (n, 8) uint32, the quants + 128, four a word; scales (n, 1) uint16."""
    def case(blocks: np.ndarray) -> str | None:
        got = yours(blocks.copy())
        if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, np.ndarray) for part in got):
            return f"expected two arrays, words and scales, got {got!r:.60}"
        wanted = [array.numpy() for array in _packed(blocks, len(blocks), 32).arrays]
        for name, mine, right in zip(("words", "scales"), got, wanted, strict=True):
            if mine.shape != right.shape or mine.dtype != right.dtype:
                return f"{name}: expected {right.dtype} {right.shape}, got {mine.dtype} {mine.shape}"
            if (mine != right).any():
                at = tuple(int(i) for i in np.argwhere(mine != right)[0])
                return f"{name}{list(at)}: expected {right[at]:#x}, got {mine[at]:#x}"
        return None

    count = np.zeros((1, 34), dtype=np.uint8)
    count[0, 2:] = np.arange(32)
    return examine("repack_q8_0", {
        "a block whose quants are 0 to 31, scale 0": lambda: case(count),
        "a block of zeros": lambda: case(np.zeros((1, 34), dtype=np.uint8)),
        "negative quants: 255 in the file is -1": lambda: case(np.full((1, 34), 255, dtype=np.uint8)),
        "twelve random blocks": lambda: case(_blocks(3, 128)),
    })


def check_kernel_q8_0(yours: Callable[[UOp, UOp, UOp, UOp], UOp]) -> bool:
    """(out, x, words, scales) in a kernel -> the kernel: out[row] = sum of the row's values times x."""
    def case(blocks: np.ndarray, rows: int, columns: int) -> str | None:
        weight, values = _packed(blocks, rows, columns), unpack(blocks.reshape(-1), Q8_0, (rows, columns))
        x = np.random.default_rng(1).standard_normal(columns).astype(np.float32)
        try:
            out = Tensor.empty(rows).custom_kernel(Tensor(x).realize(), *weight.arrays, fxn=checked(yours))[0].numpy()
        except NotAKernel as wrong:
            return str(wrong)
        wanted = values.astype(np.float64) @ x
        size = np.abs(values) @ np.abs(x) + 1e-30                           # what rounding is measured against
        off = np.abs(out - wanted) / size
        worst = int(np.where(np.isfinite(off), off, np.inf).argmax())
        if np.isfinite(off).all() and off.max() < 1e-5:
            return None
        return f"row {worst}: expected {wanted[worst]:.6g}, got {out[worst]:.6g}"

    tiny = _blocks(4, 64)
    tiny[:, :2] = np.array([3], dtype=np.uint16).view(np.uint8)             # a scale of 3 · 2^-24: subnormal
    return examine("kernel_q8_0", {
        "one row of 32": lambda: case(_blocks(1, 32), 1, 32),
        "six rows of 256": lambda: case(_blocks(6, 256), 6, 256),
        "rows of zeros": lambda: case(np.zeros((4, 34), dtype=np.uint8), 2, 64),
        "subnormal scales": lambda: case(tiny, 4, 64),
        "negative scales": lambda: case(_negative(), 4, 64),
    })


def _negative() -> np.ndarray:
    blocks = _blocks(4, 64)
    blocks[:, 1] |= 0x80
    return blocks


def check_fixed_time(yours: Callable[[float, float, float, float], float]) -> bool:
    """(seconds, bytes, other_seconds, other_bytes) of a token in two formats -> the seconds that are not bytes."""
    def made(fixed: float, bandwidth: float, one: float, two: float) -> str | None:
        return expects(_number(yours(fixed + one / bandwidth, one, fixed + two / bandwidth, two)), fixed, 1e-6)

    return examine("fixed_time", {
        "half of the bytes, and still 3/4 of the time: half of it was fixed": lambda: expects(
            _number(yours(4.0, 8.0, 3.0, 4.0)), 2.0),
        "another pair": lambda: made(0.010, 4e11, 8.5e9, 4.5e9),
        "whichever comes first": lambda: made(0.003, 1e12, 2.0e9, 3.8e9),
    })


def _number(value) -> object:
    return float(value) if isinstance(value, np.floating) else value
