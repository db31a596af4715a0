"""What kernels of attention share: the largest of some scores, and a score that weighs nothing."""
from tinygrad.uop.ops import Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT

NOWHERE = -1e30     # a score that weighs nothing


def higher(a: UOp, b: UOp, device: str) -> UOp:
    """The larger number. (tinygrad would write a condition, of which CUDA's compiler makes two instructions.)"""
    return UOp(Ops.CUSTOMI, FLOAT, (a, b), "fmaxf({0}, {1})") if tuning.is_cuda(device) else a.maximum(b)


def largest(values: list[UOp], device: str) -> UOp:
    """The largest of some numbers, found in pairs."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=False)
        values = [higher(a, b, device) for a, b in pairs] + values[len(values) // 2 * 2:]
    return values[0]
