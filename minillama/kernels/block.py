"""Shared memory of a block's threads, and a mean over them."""
from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import UOp

from minillama.kernels.tuning import fitting

MEAN = 9        # number of the first of two shared buffers


def const(index: int) -> UOp:
    """A number to index with."""
    return UOp.const(index, dtypes.weakint)


def shared_memory(number: int, *shape: int) -> UOp:
    """A buffer that a block's threads share, (shape) float32; each one of a kernel has a number of its own. (If
    tinygrad chose, numbers would go on from kernel to kernel, and the same kernel of two layers would be compiled
    twice.)"""
    return UOp.placeholder(shape, dtypes.float32, number, AddrSpace.LOCAL)


def mean_of_threads(x: UOp, thread: UOp, threads: int) -> UOp:
    """The mean of a value that each thread has, for all of them, in two stages: each thread adds up an eighth of the
    values, then the eight sums (a single sum would be one long chain of additions)."""
    parts = fitting(8, threads)
    size, part = threads // parts, thread // (threads // parts)
    shared, sums = shared_memory(MEAN, threads), shared_memory(MEAN + 1, parts)
    shared = shared.after(UOp.barrier(shared.index(thread).store(x)))
    mine = sum(shared.index(part * size + n).load() for n in range(size))
    sums = sums.after(UOp.barrier(sums.index(part).store(mine)))
    return sum(sums.index(const(n)).load() for n in range(parts)) * (1 / threads)
