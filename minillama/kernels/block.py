"""What the threads of a block tell each other, through memory that they share."""
from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import UOp


def const(index: int) -> UOp:
    """A number to index with."""
    return UOp.const(index, dtypes.weakint)


def shared_memory(*shape: int) -> UOp:
    """Room that the threads of a block share, (shape) float32."""
    return UOp.placeholder(shape, dtypes.float32, addrspace=AddrSpace.LOCAL)


def mean_of_threads(x: UOp, thread: UOp, threads: int) -> UOp:
    """The mean of a value that each thread has, known to all of them once all have met."""
    board = shared_memory(threads)
    ready = UOp.barrier(board.index(thread).store(x))
    return sum(board.after(ready).index(const(other)).load() for other in range(threads)) * (1 / threads)
