"""The delta rule for a prompt, token by token in one kernel, for CPUs: a core does a head by itself, and the memory
stays in its nearest cache.

Chunks (`chunks.py`; `delta_net.chunked` is the twin) keep matrix units busy, and threads from waiting for each other.
A core has neither, and loses by them: they take more operations than the rule itself, which goes over the memory twice
a token, once to read and once to write. The innermost loops run along its columns (`steps.py`).
"""
from tinygrad import Tensor
from tinygrad.uop.ops import UOp

from minillama.kernels.cores import on_cpu
from minillama.kernels.product import result
from minillama.kernels.steps import Steps, real
from minillama.kernels.tuning import fitting

ROWS = 4            # of the memory that a loop does at once: what it adds them to is loaded and stored once for all


def fits(device: str, tokens: int) -> bool:
    """Whether this is the form for so many tokens on a device: on a CPU."""
    return on_cpu(device) and tokens > 1


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The gated delta rule; arguments and results as `delta_net.recurrent`."""
    (tokens, heads, dim), keys = v.shape, k.shape[1]
    rows, device = fitting(ROWS, dim), v.device
    q, k, v, keep, beta, state = (x.contiguous() for x in (q, k, v, g.exp(), beta, state))

    def kernel(out: UOp, memory: UOp, q: UOp, k: UOp, v: UOp, keep: UOp, beta: UOp, state: UOp) -> UOp:
        steps = Steps(device)
        head = steps.each(heads, shared=True)
        own = head // (heads // keys)
        row, column = loops = steps.loop(dim), steps.loop(dim)
        steps.do(loops, memory.index(head, row, column).store(state.index(head, row, column).load()))
        t = steps.loop(tokens)
        kept, strength, new = keep.index(t, head).load(), beta.index(t, head).load(), steps.room(dim)

        # what the key holds now: S·k
        column = steps.loop(dim)
        steps.do((column,), steps.now(new, t).index(column).store(real(0)))
        block, column = loops = steps.loop(dim // rows), steps.loop(dim)
        places, held = [block * rows + n for n in range(rows)], steps.now(new, block).index(column)
        found = sum(k.index(t, own, place).load() * steps.now(memory).index(head, place, column).load()
                    for place in places)
        steps.do(loops, held.store(held.load() + found))

        # what is missing
        column = steps.loop(dim)
        cell = steps.now(new).index(column)
        missing = (v.index(t, head, column).load() - cell.load() * kept) * strength
        steps.do((column,), cell.store(missing), steps.now(out).index(t, head, column).store(real(0)))

        # forget, write it, and read what the query asks for
        block, column = loops = steps.loop(dim // rows), steps.loop(dim)
        places, write = [block * rows + n for n in range(rows)], steps.now(new).index(column).load()
        cells = [steps.now(memory).index(head, place, column) for place in places]
        values = [cell.load() * kept + k.index(t, own, place).load() * write
                  for cell, place in zip(cells, places, strict=True)]
        read = sum(q.index(t, own, place).load() * dim ** -0.5 * value
                   for place, value in zip(places, values, strict=True))
        told = steps.now(out, block).index(t, head, column)
        steps.do(loops, told.store(told.load() + read), *(
            cell.store(value) for cell, value in zip(cells, values, strict=True)))
        steps.end(t)
        return steps.kernel(f"recurrence_{tokens}_{heads}_{dim}")
    out, memory = result(tokens, heads, dim, like=v), result(heads, dim, dim, like=v)
    return tuple(out.custom_kernel(memory, q, k, v, keep, beta, state, fxn=kernel)[:2])
