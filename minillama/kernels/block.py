"""What the threads of a block tell each other, through memory that they share."""
from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import UOp

from minillama.kernels.tuning import fitting

MEAN = 9        # the number of the room where a mean is found


def const(index: int) -> UOp:
    """A number to index with."""
    return UOp.const(index, dtypes.weakint)


def shared_memory(number: int, *shape: int) -> UOp:
    """Room that the threads of a block share, (shape) float32; each room of a kernel has a number of its own. (Left to
    tinygrad, the numbers go on from kernel to kernel: the same one in two layers is then compiled twice.)"""
    return UOp.placeholder(shape, dtypes.float32, number, AddrSpace.LOCAL)


def mean_of_threads(x: UOp, thread: UOp, threads: int) -> UOp:
    """The mean of a value that each thread has, known to all of them once all have met. They meet twice: each adds up
    an eighth of the values, then the eight sums (one sum over all would be one long chain of additions)."""
    parts = fitting(8, threads)
    size, part = threads // parts, thread // (threads // parts)
    shared, sums = shared_memory(MEAN, threads), shared_memory(MEAN + 1, parts)
    shared = shared.after(UOp.barrier(shared.index(thread).store(x)))
    mine = sum(shared.index(part * size + n).load() for n in range(size))
    sums = sums.after(UOp.barrier(sums.index(part).store(mine)))
    return sum(sums.index(const(n)).load() for n in range(parts)) * (1 / threads)
