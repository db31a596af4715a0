"""What kernels of attention share: the largest of some scores or threads' scores, one that weighs nothing."""
from tinygrad.uop.ops import Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT
from minillama.kernels.block import const, shared_memory
from minillama.kernels.tuning import fitting

NOWHERE = -1e30     # a score that weighs nothing
LARGEST = 13        # number of the first of two shared buffers


def higher(a: UOp, b: UOp, device: str) -> UOp:
    """The larger number. (tinygrad would write a condition, of which CUDA's compiler makes two instructions.)"""
    return UOp(Ops.CUSTOM, FLOAT, (a, b), "fmaxf({0}, {1})") if tuning.is_cuda(device) else a.maximum(b)


def largest(values: list[UOp], device: str) -> UOp:
    """The largest of some numbers, found in pairs."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [higher(a, b, device) for a, b in pairs] + values[len(values) // 2 * 2:]
    return values[0]


def largest_of_threads(x: UOp, thread: UOp, threads: int, device: str) -> UOp:
    """The largest value that a thread has, for all of them, in two stages as `block.mean_of_threads`."""
    parts = fitting(8, threads)
    size, part = threads // parts, thread // (threads // parts)
    shared, highs = shared_memory(LARGEST, threads), shared_memory(LARGEST + 1, parts)
    shared = shared.after(UOp.barrier(shared.index(thread).store(x)))
    mine = largest([shared.index(part * size + n).load() for n in range(size)], device)
    highs = highs.after(UOp.barrier(highs.index(part).store(mine)))
    return largest([highs.index(const(n)).load() for n in range(parts)], device)
