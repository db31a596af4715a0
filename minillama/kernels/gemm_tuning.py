"""How a prompt's kernels are spread over threads, as `tuning.py` has it for others."""
from collections.abc import Iterator
from dataclasses import dataclass

from tinygrad.codegen.opt import Opt, OptOps

from minillama.kernels.tuning import fitting, shares_memory


@dataclass(frozen=True)
class GemmTiling:
    """How a prompt's product on tensor cores is tiled (`gemm.py`): times 16 rows (of each matrix) and times 8 tokens
    that a warp does at once, warps of a block along rows and along tokens, stages in shared memory."""
    each: int
    columns: int
    down: int
    across: int
    stages: int

    @property
    def warps(self) -> int:
        return self.down * self.across

    @property
    def rows(self) -> int:
        return self.down * self.each * 16

    @property
    def tokens(self) -> int:
        return self.across * self.columns * 8


def tilings(tokens: int, rows: int, matrices: int = 1) -> Iterator[GemmTiling]:
    """Tilings for so many tokens and rows of each matrix, the fastest first, for a kernel to take the first that
    shared memory has room for. (Measured on an H200 with Q4_0, Q8_0 and Q4_K; other formats take the same, untried.)
    """
    if tokens % 64 == 0 and matrices == 1 and -(-rows // 128) * (tokens // 64) >= 128:
        yield GemmTiling(4, 4, 2, 2, 2)
        yield GemmTiling(2, 4, 2, 2, 2)
    columns = fitting(4, tokens // 8)
    for each in (4, 2, 1) if columns < 4 and matrices == 1 else (2, 1):
        if rows % (64 * each) == 0:
            yield GemmTiling(each, columns, 4, 1, 2)
        if each == 4 and rows % 128 == 0:
            yield GemmTiling(4, columns, 2, 1, 2)
    yield GemmTiling(1, columns, 4, 1, 2)
    yield GemmTiling(1, fitting(2, columns), 2, 1 + (tokens % 32 == 0), 2)


def over_channels(device: str, channels: int) -> tuple[Opt, ...]:
    """Options for a kernel over channels (axis 1): two neighbours a thread, blocks of 64 threads (nothing else was
    tried)."""
    if not shares_memory(device):
        return ()
    each = fitting(2, channels)
    opts = Opt(OptOps.UPCAST, 1, each), Opt(OptOps.LOCAL, 1, fitting(64, channels // each))
    return tuple(opt for opt in opts if opt.arg > 1)


def over_rows(device: str, size: int) -> tuple[Opt, ...]:
    """Options for a kernel over rows (axis 0) and so many items of each: a block does items of one row (nothing else
    was tried)."""
    return (Opt(OptOps.LOCAL, 1, fitting(128, size)),) if shares_memory(device) else ()
