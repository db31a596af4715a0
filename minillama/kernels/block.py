"""What the threads of a block tell each other, through memory that they share."""
from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import UOp

MEAN = 9        # the number of the room where a mean is found


def const(index: int) -> UOp:
    """A number to index with."""
    return UOp.const(index, dtypes.weakint)


def shared_memory(number: int, *shape: int) -> UOp:
    """Room that the threads of a block share, (shape) float32; each room of a kernel has a number of its own. (Left to
    tinygrad, the numbers go on from kernel to kernel: the same one in two layers is then compiled twice.)"""
    return UOp.placeholder(shape, dtypes.float32, number, AddrSpace.LOCAL)


def mean_of_threads(x: UOp, thread: UOp, threads: int) -> UOp:
    """The mean of a value that each thread has, known to all of them once all have met."""
    board = shared_memory(MEAN, threads)
    ready = UOp.barrier(board.index(thread).store(x))
    return sum(board.after(ready).index(const(other)).load() for other in range(threads)) * (1 / threads)
