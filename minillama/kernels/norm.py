"""RMS norm as one kernel. Plain tensor code takes two: one for the sum of squares, one for what it scales."""
from tinygrad import Tensor
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.block import mean_of_threads
from minillama.kernels.product import result
from minillama.kernels.sums import added, counter

THREADS = 128


def rms_norm_twin(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Rows of x (tokens, dim) at root mean square 1, times weight (dim,)."""
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the twin. A block of threads does one token: it reads x and the weight once and writes the result once."""
    (tokens, dim), device = x.shape, x.device

    def by_block(out: UOp, x: UOp, weight: UOp) -> UOp:
        token, lane = UOp.range(tokens, 0), UOp.range(THREADS, 1, AxisType.LOCAL)
        places = [lane + THREADS * j for j in range(dim // THREADS)]
        values = [x.index(token, place).load() for place in places]
        scale = (mean_of_threads(sum(v * v for v in values), lane, THREADS) * (THREADS / dim) + eps).rsqrt()
        stores = [out.index(token, place).store(v * scale * weight.index(place).load())
                  for place, v in zip(places, values, strict=True)]
        return UOp.group(*stores).end(token, lane).sink(arg=KernelInfo(f"rms_norm_{tokens}_{dim}", opts_to_apply=()))

    def by_loop(out: UOp, x: UOp, weight: UOp) -> UOp:
        parts = tuning.chains(device, dim)
        token, place, other = UOp.range(tokens, 0), UOp.range(dim, 1), counter(dim // parts, 2)
        values = [x.index(token, other * parts + n).load() for n in range(parts)]
        square = sum(added(value * value, other) for value in values)
        value = x.index(token, place).load() * (square * (1 / dim) + eps).rsqrt() * weight.index(place).load()
        return out.index(token, place).store(value).end(token, place).sink(
            arg=KernelInfo(f"rms_norm_{tokens}_{dim}", opts_to_apply=()))
    together = tuning.shares_memory(device) and dim % THREADS == 0
    return result(tokens, dim, like=x).custom_kernel(x, weight, fxn=by_block if together else by_loop)[0]
