"""RMS norm as one kernel, also with what gates its result. Plain tensor code takes two: one for the sum of squares,
one for what it scales."""
from tinygrad import Tensor
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.block import mean_of_threads
from minillama.kernels.cores import on_cpu
from minillama.kernels.product import Column, result
from minillama.kernels.steps import Steps
from minillama.kernels.sums import added, counter
from minillama.kernels.tuning import FEW

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

    def by_number(out: UOp, x: UOp, weight: UOp) -> UOp:       # each thread finds the sum for itself
        token, place, other = UOp.range(tokens, 0), UOp.range(dim, 1), counter(dim, 2)
        square = added(x.index(token, other).load() * x.index(token, other).load(), other)
        value = x.index(token, place).load() * (square * (1 / dim) + eps).rsqrt() * weight.index(place).load()
        return out.index(token, place).store(value).end(token, place).sink(
            arg=KernelInfo(f"rms_norm_{tokens}_{dim}", opts_to_apply=()))

    def by_steps(out: UOp, x: UOp, weight: UOp) -> UOp:
        steps = Steps(device)
        token = steps.each(tokens, shared=tokens > FEW)
        square = steps.sum(dim, lambda place: x.index(token, place).load().square())
        place = steps.loop(dim)
        value = x.index(token, place).load() * (square * (1 / dim) + eps).rsqrt() * weight.index(place).load()
        steps.do((place,), out.index(token, place).store(value))
        return steps.kernel(f"rms_norm_{tokens}_{dim}")
    by_threads = by_block if tuning.shares_memory(device) and dim % THREADS == 0 else by_number
    kernel = by_steps if on_cpu(device) else by_threads
    return result(tokens, dim, like=x).custom_kernel(x, weight, fxn=kernel)[0]


def gated_twin(x: Tensor, weight: Tensor, eps: float, gate: Tensor) -> Tensor:
    """Rows of x (tokens, heads, dim) at root mean square 1, times weight (dim,), times SiLU of gate (tokens, heads *
    dim): that shape."""
    return (rms_norm_twin(x, weight, eps) * gate.reshape(x.shape).silu()).reshape(gate.shape)


def gated(x: Tensor, weight: Tensor, eps: float, gate: Column) -> Tensor:
    """As the twin, in steps: for CPUs. The gate lies in the columns of a buffer (tokens, ...) from a place on."""
    (tokens, heads, dim), (source, first), device = x.shape, gate, x.device

    def kernel(out: UOp, x: UOp, weight: UOp, gate: UOp) -> UOp:
        steps = Steps(device)
        token, head = steps.each(tokens, shared=True), steps.each(heads)
        square = steps.sum(dim, lambda place: x.index(token, head, place).load().square())
        place = steps.loop(dim)
        value = x.index(token, head, place).load() * (square * (1 / dim) + eps).rsqrt() * weight.index(place).load()
        at = head * dim + place
        steps.do((place,), out.index(token, at).store(value * gate.index(token, at + first).load().silu()))
        return steps.kernel(f"gated_norm_{tokens}_{heads}_{dim}")
    return result(tokens, heads * dim, like=x).custom_kernel(x, weight, source, fxn=kernel)[0]
