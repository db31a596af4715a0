"""The causal convolution and SiLU of a prompt in one kernel, which reads each input from where it lies: the products'
buffer, and before the first token the window. In plain tensor code (`delta_net.causal_conv`, the twin) both are copied
into one buffer first."""
from tinygrad import Tensor
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels import gemm_tuning, tuning
from minillama.kernels.block import const
from minillama.kernels.cores import between_cores
from minillama.kernels.product import Column, result

TOKENS = 8      # that a thread does: each input is loaded once for all of its outputs


def fits(tokens: int) -> bool:
    """Whether the kernel takes so many tokens: whole blocks of them, more than one."""
    return tokens % TOKENS == 0 and tokens > TOKENS


def conv(inputs: Column, window: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """inputs (tokens, channels), some columns of a buffer; window (width - 1, channels), the inputs before them;
    weight (channels, width). Returns (tokens, channels), and the buffer after it was read: what else reads it should
    wait, or tinygrad 0.14 copies it first.

    A thread of a GPU reads only what it needs. A CPU's compiler makes vectors of neighbouring channels, if they lie
    side by side and are read in any case."""
    (buffer, first), (channels, width) = inputs, weight.shape
    tokens, device = buffer.shape[0], buffer.device
    threads = tuning.shares_memory(device)
    kind = between_cores(device)
    weight = weight if threads else weight.transpose(0, 1).contiguous()

    def kernel(out: UOp, buffer: UOp, window: UOp, weight: UOp) -> UOp:
        block, channel, xs = UOp.range(tokens // TOKENS, 0, kind), UOp.range(channels, 1), []
        for n in range(1 - width, TOKENS):
            row, old = block * TOKENS + n, const(n + width - 1)
            if n < 0:
                row, old = (row.valid(block > 0), old.valid(block.eq(0))) if threads else (row.maximum(0), old)
            x = buffer.index(row, first + channel).load()
            xs.append(block.eq(0).where(window.index(old, channel).load(), x) if n < 0 else x)
        taps = [weight.index(*((channel, const(k)) if threads else (const(k), channel))).load() for k in range(width)]
        ys = [sum((xs[t + k] * tap for k, tap in enumerate(taps[1:], 1)), xs[t] * taps[0]) for t in range(TOKENS)]
        stores = [out.index(block * TOKENS + t, channel).store(y.silu()) for t, y in enumerate(ys)]
        return UOp.group(*stores).end(block, channel).sink(
            arg=KernelInfo(f"conv_{tokens}_{channels}", opts_to_apply=gemm_tuning.over_channels(device, channels)))
    return tuple(result(tokens, channels, like=buffer).custom_kernel(buffer, window, weight, fxn=kernel)[:2])
