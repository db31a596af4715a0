"""The delta rule for a prompt's chunks in two kernels, where threads share memory: what each chunk writes is solved
for, all chunks at once; then a loop carries the memory through them.

In plain tensor code (`delta_net.chunked`, the twin) both take many kernels, and those of the loop wait for each other.
A column of the memory does not know of the others, so a block of threads takes some through the whole prompt: it keeps
them in registers, and in memory that its threads share what they have to tell each other.
"""
from tinygrad import Tensor
from tinygrad.dtype import AddrSpace, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tensor_cores, tuning
from minillama.kernels.block import const, shared_memory
from minillama.kernels.product import result
from minillama.kernels.sums import added, counter

CHUNK = 64          # tokens
COLUMNS = 16        # of the memory, of a block (measured on an H200)
TERMS, STEP = 4, 16 # of a sum that are read at once, in either kernel
THREADS = 1024      # of a block, at most
REGISTERS = 1000    # a number that none of the optimizer's own sums has
ROWS = 8            # of a chunk whose solution is kept in registers: all in one would take compilers long


def fits(device: str, tokens: int, dim: int) -> bool:
    """Whether these kernels can do that many tokens with memories of that size on a device."""
    divided = tokens % CHUNK == 0 and dim % CHUNK == 0 and CHUNK * CHUNK % (2 * dim) == 0     # among threads
    room = (dim + 2 * CHUNK) * COLUMNS * 4                                  # bytes that `carried` shares
    return tuning.shares_memory(device) and divided and 2 * dim <= THREADS and room <= tuning.SHARED_ANYWHERE


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, chunk: int = CHUNK,
            ) -> tuple[Tensor, Tensor]:
    """The gated delta rule; arguments and results as `delta_net.recurrent`."""
    (tokens, heads, dim), keys = v.shape, q.shape[1]
    count = tokens // chunk
    k, v, beta, state = (x.contiguous() for x in (k, v, beta, state))
    total = g.reshape(count, chunk, heads).permute(2, 0, 1).cumsum(-1).contiguous()     # (heads, chunks, chunk)
    asked = q.reshape(count, chunk, keys, dim).permute(2, 0, 3, 1).contiguous()         # (k_heads, chunks, dim, chunk)
    told = k.reshape(count, chunk, keys, dim).permute(2, 0, 1, 3)                       # (k_heads, chunks, chunk, dim)
    units = tuning.multiplies_halves(k.device, chunk)
    kk, kq = ((tensor_cores.product(told, x) if units else told @ x.transpose(-1, -2)).contiguous()
              for x in (told, asked.transpose(-1, -2)))                     # (k_heads, chunks, chunk, chunk)
    shared = kq.unsqueeze(1).expand(keys, heads // keys, *kq.shape[1:]).reshape(heads, *kq.shape[1:])
    since = (total.unsqueeze(-2) - total.unsqueeze(-1)).triu().exp().triu()             # (.., j, i): decay from j to i
    inside = (shared * since * dim ** -0.5).contiguous()                                # (heads, chunks, chunk, chunk)
    return carried(asked, k, total, inside, solved(kk, k, v, total, beta), state)


def solved(kk: Tensor, k: Tensor, v: Tensor, total: Tensor, beta: Tensor) -> Tensor:
    """What every chunk writes, (heads, chunks, 2 * dim, chunk): first from its values alone, then what the memory that
    comes in takes away from it, for each of its rows.

    kk (k_heads, chunks, chunk, chunk) products of keys; k (tokens, k_heads, dim); v (tokens, heads, dim); total
    (heads, chunks, chunk), the decay's logarithm since the chunk began; beta (tokens, heads). A thread solves for one
    column, from the first token to the last: from each is taken away what those before it write under its key.
    """
    (heads, count, chunk), (_, keys, dim) = total.shape, k.shape
    share, threads = heads // keys, 2 * dim

    def kernel(out: UOp, kk: UOp, k: UOp, v: UOp, total: UOp, beta: UOp) -> UOp:
        head, n = UOp.range(heads, 0), UOp.range(count, 1)
        column = UOp.range(threads, 2, AxisType.LOCAL)
        shared, stores = shared_memory(0, chunk, chunk), []
        for part in range(chunk * chunk // threads):
            place = column + part * threads
            i, j = place // chunk, place % chunk
            decay = (total.index(head, n, i).load() - total.index(head, n, j).load()).minimum(0).exp()
            left = kk.index(head // share, n, i, j).load() * decay * beta.index(n * chunk + i, head).load()
            stores.append(shared.index(i, j).store(left))
        shared, own, place = shared.after(UOp.barrier(*stores)), column < dim, column % dim
        for start in range(0, chunk, ROWS):
            rows, news = range(start, min(start + ROWS, chunk)), []
            j = counter(start // TERMS, 3 + start // ROWS)
            before = [j * TERMS + s for s in range(TERMS)] if start else []
            others = [out.index(head, n, column, other).load() for other in before]
            for i in rows:
                token = n * chunk + i
                new = own.where(v.index(token, head, place).load(), k.index(token, head // share, place).load()
                                * total.index(head, n, const(i)).load().exp()) * beta.index(token, head).load()
                if start:
                    new = new - added(sum(shared.index(const(i), at).load() * x
                                          for at, x in zip(before, others, strict=True)), j)
                for at, x in zip(rows, news, strict=False):
                    new = new - shared.index(const(i), const(at)).load() * x
                news.append(new)
            done = UOp.group(*(out.index(head, n, column, const(i)).store(x) for i, x in zip(rows, news, strict=True)))
            out = out.after(done)
        return done.end(head, n, column).sink(
            arg=KernelInfo(f"solved_{heads}_{count}_{chunk}_{dim}", opts_to_apply=()))
    out = result(heads, count, threads, chunk, like=k)
    return out.custom_kernel(kk, k, v, total, beta, fxn=kernel)[0]


def carried(q: Tensor, k: Tensor, total: Tensor, inside: Tensor, writes: Tensor, state: Tensor) -> tuple[Tensor, ...]:
    """The memory carried through all chunks: out (tokens, heads, dim), and the memory after the last.

    q (k_heads, chunks, dim, chunk); k (tokens, k_heads, dim); total (heads, chunks, chunk); inside (heads, chunks,
    chunk, chunk), how much of what each token wrote each one reads; writes as `solved` has them; state (heads, dim,
    dim). A thread has one row of the block's columns; of a chunk's tokens, some columns of one. What neighbours read
    lies side by side, or is the same.
    """
    (heads, count, chunk), (tokens, keys, dim) = total.shape, k.shape
    share, width = heads // keys, COLUMNS
    each = width * chunk // dim                     # columns of a token that a thread has

    def kernel(out: UOp, new: UOp, q: UOp, k: UOp, total: UOp, inside: UOp, writes: UOp, state: UOp) -> UOp:
        head, group = UOp.range(heads, 0), UOp.range(dim // width, 1)
        thread, n = UOp.range(dim, 2, AxisType.LOCAL), UOp.range(count, 3, AxisType.REDUCE)
        first, row, mine = group * width, thread % chunk, thread // chunk * each
        token, own = n * chunk + row, head // share
        memory = UOp.placeholder((width,), dtypes.float32, REGISTERS, AddrSpace.REG)
        memory = memory.after(*(memory.index(const(c)).store(state.index(head, thread, first + c).load())
                                for c in range(width)))
        held = [memory.after(n).index(const(c)).load() for c in range(width)]
        shared = shared_memory(0, dim, width)
        shared = shared.after(UOp.barrier(*(shared.index(thread, const(c)).store(x) for c, x in enumerate(held))))
        r = counter(dim // STEP, 4)
        places = [r * STEP + s for s in range(STEP)]
        erase, asked = ([x.load() for x in rows] for rows in (
            [writes.index(head, n, place + dim, row) for place in places],
            [q.index(own, n, place, row) for place in places]))
        kept = [[shared.index(place, mine + c).load() for place in places] for c in range(each)]
        gone, read = ([added(sum(a * b for a, b in zip(factors, values, strict=True)), r) for values in kept]
                      for factors in (erase, asked))
        here, end = (total.index(head, n, at).load() for at in (row, const(chunk - 1)))
        fresh, aged = shared_memory(1, chunk, width), shared_memory(2, chunk, width)
        news = [writes.index(head, n, first + mine + c, row).load() - x for c, x in enumerate(gone)]
        met = UOp.barrier(*(fresh.index(row, mine + c).store(x) for c, x in enumerate(news)),
                          *(aged.index(row, mine + c).store(x * (end - here).exp()) for c, x in enumerate(news)))
        fresh, aged = fresh.after(met), aged.after(met)
        i = counter(chunk // STEP, 5)
        others = [i * STEP + s for s in range(STEP)]
        key = [k.index(n * chunk + other, own, thread).load() for other in others]
        seen = [inside.index(head, n, other, row).load() for other in others]
        written = [added(sum(a * aged.index(other, const(c)).load() for a, other in zip(key, others, strict=True)), i)
                   for c in range(width)]
        told = [added(sum(a * fresh.index(other, mine + c).load() for a, other in zip(seen, others, strict=True)), i)
                for c in range(each)]
        stores = [out.index(token, head, first + mine + c).store(x * here.exp() * dim ** -0.5 + y)
                  for c, (x, y) in enumerate(zip(read, told, strict=True))]
        stores += [memory.index(const(c)).store(x * end.exp() + y)
                   for c, (x, y) in enumerate(zip(held, written, strict=True))]
        memory = memory.after(UOp.group(*stores).end(n))
        return UOp.group(*(new.index(head, thread, first + c).store(memory.index(const(c)).load())
                           for c in range(width))).end(head, group, thread).sink(
            arg=KernelInfo(f"carried_{heads}_{count}_{chunk}_{dim}", opts_to_apply=()))
    out, new = result(tokens, heads, dim, like=k), result(heads, dim, dim, like=k)
    return tuple(out.custom_kernel(new, q, k, total, inside, writes, state, fxn=kernel)[:2])
