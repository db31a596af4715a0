"""The delta rule for a prompt, token by token in one kernel, where a core does a head by itself: the memory stays in its
nearest cache.

Chunks (`chunks.py`; `delta_net.chunked` is the twin) keep matrix units busy and threads from waiting for each other. A
core that has neither loses by them: they take more operations than the rule itself, which goes over the memory twice a
token, to read and to write. The innermost loops run along its columns and are left to the compiler, which makes
vectors of them.
"""
from tinygrad import Tensor
from tinygrad.dtype import AddrSpace, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.product import result
from minillama.kernels.tuning import fitting

ROWS = 4            # of the memory that a loop does at once: what it adds them to is loaded and stored once for all
NEW = 100           # number of a buffer


def fits(device: str, tokens: int) -> bool:
    """Whether this is how to do so many tokens on a device: where threads share no memory."""
    return not tuning.shares_memory(device) and tokens > 1


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The gated delta rule; arguments and results as `delta_net.recurrent`."""
    (tokens, heads, dim), keys = v.shape, k.shape[1]
    rows = fitting(ROWS, dim)
    q, k, v, keep, beta, state = (x.contiguous() for x in (q, k, v, g.exp(), beta, state))

    def kernel(out: UOp, memory: UOp, q: UOp, k: UOp, v: UOp, keep: UOp, beta: UOp, state: UOp) -> UOp:
        head = UOp.range(heads, 0)
        own, (row, column) = head // (heads // keys), (UOp.range(dim, n) for n in (1, 2))
        start = memory.index(head, row, column).store(state.index(head, row, column).load())
        t = UOp.range(tokens, 3, AxisType.REDUCE)
        memory, out = memory.after(start.end(column).end(row)).after(t), out.after(t)
        new = UOp.placeholder((dim,), dtypes.float32, NEW, AddrSpace.REG).after(t)
        kept, strength = keep.index(t, head).load(), beta.index(t, head).load()

        # what the key holds now: S·k
        column = UOp.range(dim, 4)
        new = new.after(new.index(column).store(UOp.const(0.0, dtypes.float32)).end(column))
        block, column = UOp.range(dim // rows, 5, AxisType.REDUCE), UOp.range(dim, 6)
        places, held = [block * rows + n for n in range(rows)], new.after(block).index(column)
        key = [k.index(t, own, place).load() for place in places]
        found = sum(x * memory.index(head, place, column).load() for x, place in zip(key, places, strict=True))
        new = new.after(held.store(held.load() + found).end(column).end(block))

        # what is missing
        column = UOp.range(dim, 7)
        missing = (v.index(t, head, column).load() - new.index(column).load() * kept) * strength
        ready = UOp.group(new.index(column).store(missing),
                          out.index(t, head, column).store(UOp.const(0.0, dtypes.float32))).end(column)

        # forget, write it, and read what the query asks for
        block, column = UOp.range(dim // rows, 8, AxisType.REDUCE), UOp.range(dim, 9)
        places = [block * rows + n for n in range(rows)]
        new, memory, told = new.after(ready), memory.after(ready, block), out.after(ready, block).index(t, head, column)
        cells, write = [memory.index(head, place, column) for place in places], new.index(column).load()
        key, asked = ([x.index(t, own, place).load() for place in places] for x in (k, q))
        values = [cell.load() * kept + x * write for cell, x in zip(cells, key, strict=True)]
        read = sum(x * dim ** -0.5 * value for x, value in zip(asked, values, strict=True))
        stores = [cell.store(value) for cell, value in zip(cells, values, strict=True)]
        return UOp.group(*stores, told.store(told.load() + read)).end(column).end(block).end(t).end(head).sink(
            arg=KernelInfo(f"recurrence_{tokens}_{heads}_{dim}", opts_to_apply=()))
    out, memory = result(tokens, heads, dim, like=v), result(heads, dim, dim, like=v)
    return tuple(out.custom_kernel(memory, q, k, v, keep, beta, state, fxn=kernel)[:2])
