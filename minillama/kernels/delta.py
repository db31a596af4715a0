"""Gated DeltaNet for a few tokens as two kernels: the convolution, then everything from the keys to the gated output.
Where threads share memory, one does both.

What a layer remembers is indexed by position, modulo what there is room for: the inputs of the last `HISTORY` tokens,
and the memory after each of the last tokens, a ring of slots. A token at position p reads slot p, writes slot p + 1.
So nothing is copied to step back: a rejected token is one whose slot is written again. (The one operation is what
llama.cpp #19504 made; it steps back by copying snapshots.)
"""
from tinygrad import Tensor
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.block import const, mean_of_threads, shared_memory
from minillama.kernels.product import Column, result
from minillama.kernels.ring import slot_of
from minillama.kernels.sums import added, counter

HISTORY = 16        # inputs of the convolution that are kept: those a token sees and those of a batch of up to 8
MOST = 8            # tokens at once
LANES = 8           # threads that share a column of the memory
BESIDE = 4          # columns of a thread, read and written together (an H200: 9.6 µs a step with one, 6.1 with four)


# ---- convolution --------------------------------------------------------------------------------------------------


def conv_twin(inputs: Tensor, history: Tensor, weight: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """SiLU of a causal depthwise convolution, and the history with the new inputs.

    inputs (tokens, channels); history (HISTORY, channels), row p % HISTORY for position p; weight (channels, width).
    Positions before the text read rows that are still 0.
    """
    tokens, width = inputs.shape[0], weight.shape[1]
    rows = [history[(position + s) % HISTORY] for s in range(1 - width, 0)] + [inputs[t] for t in range(tokens)]
    out = Tensor.stack(*(sum(rows[t + w] * weight[:, w] for w in range(width)) for t in range(tokens))).silu()
    at = {(position + t) % HISTORY: t for t in range(tokens)}
    return out, Tensor.stack(*(inputs[at[i]] if i in at else history[i] for i in range(HISTORY)))


def conv(inputs: Column, history: Tensor, weight: Tensor, position: Tensor) -> Tensor:
    """As `conv_twin`, the history written in place; position (1,) int32. One thread does one channel: it reads its
    inputs where the projection left them and width - 1 rows of history, and writes each input and output once."""
    source, first = inputs
    (channels, width), tokens = weight.shape, source.shape[0]
    if tokens > MOST:
        raise ValueError(f"{tokens} tokens at once: the history has room for {MOST}")

    def kernel(out: UOp, history: UOp, source: UOp, weight: UOp, position: UOp) -> UOp:
        channel = UOp.range(channels, 0)
        past = [history.index(slot_of(position, s, HISTORY), channel).load() for s in range(1 - width, 0)]
        new = [source.index(const(t), channel + first).load() for t in range(tokens)]
        rows, taps = past + new, [weight.index(channel, const(w)).load() for w in range(width)]
        stores = [history.index(slot_of(position, t, HISTORY), channel).store(new[t]) for t in range(tokens)]
        stores += [out.index(const(t), channel).store(
            sum(rows[t + w] * tap for w, tap in enumerate(taps)).silu()) for t in range(tokens)]
        return UOp.group(*stores).end(channel).sink(arg=KernelInfo(f"conv_{tokens}_{channels}"))
    out = result(tokens, channels, like=source)
    return out.custom_kernel(history, source, weight, position, fxn=kernel)[0]


# ---- the rule -----------------------------------------------------------------------------------------------------


def step_twin(qkv: Tensor, z: Tensor, b: Tensor, a: Tensor, ring: Tensor, dt_bias: Tensor, decay: Tensor,
              norm: Tensor, eps: float, position: int) -> tuple[Tensor, Tensor]:
    """The gated delta rule, token by token, its output normed and gated; and the ring with the new memories.

    qkv (tokens, channels) after the convolution; z (tokens, v_heads * dim); b, a (tokens, v_heads); ring (slots,
    v_heads, dim, dim), slot p % slots the memory before position p; dt_bias, decay (v_heads,), decay < 0;
    norm (dim,). Returns y (tokens, v_heads * dim) and the ring.
    """
    slots, heads, dim, _ = ring.shape
    tokens, keys = qkv.shape[0], (qkv.shape[1] - heads * dim) // 2
    memories, outs = list(ring), []
    q, k, v = (part.reshape(tokens, -1, dim) for part in qkv.split([keys, keys, heads * dim], dim=1))
    share = heads // q.shape[1]
    q, k = ((part * (part.square().sum(-1, keepdim=True) + 1e-6).rsqrt()).repeat_interleave(share, dim=1)
            for part in (q, k))
    for t in range(tokens):
        memory = memories[(position + t) % slots] * ((a[t] + dt_bias).softplus() * decay).exp().reshape(heads, 1, 1)
        delta = (v[t] - (memory * k[t].unsqueeze(-1)).sum(1)) * b[t].sigmoid().unsqueeze(-1)   # (heads, dim)
        memory = memory + k[t].unsqueeze(-1) * delta.unsqueeze(1)
        memories[(position + t + 1) % slots] = memory
        outs.append((memory * q[t].unsqueeze(-1)).sum(1) * dim ** -0.5)
    out = Tensor.stack(*outs)                                               # (tokens, heads, dim)
    y = out * (out.square().mean(-1, keepdim=True) + eps).rsqrt() * norm * z.reshape(out.shape).silu()
    return y.reshape(tokens, heads * dim), Tensor.stack(*memories)


def step(qkv: Tensor, z: Column, b: Column, a: Column, ring: Tensor, dt_bias: Tensor, decay: Tensor, norm: Tensor,
         eps: float, position: Tensor) -> Tensor:
    """As `step_twin`, the ring written in place; position (1,) int32. Needs more slots than tokens.

    Where threads can share memory, a block does one head: each of its threads holds a part of a column in registers,
    reads it once and writes it once. Elsewhere a loop goes down each column twice.
    """
    tokens, slots = qkv.shape[0], ring.shape[0]
    if tokens >= slots:
        raise ValueError(f"{tokens} tokens need {tokens + 1} slots, the ring has {slots}")
    given = (z, b, a, ring, dt_bias, decay, norm, eps, position)
    return by_heads((qkv, 0), qkv.shape[1], *given) if by_blocks(ring) else by_columns(qkv, *given)


def by_blocks(ring: Tensor) -> bool:
    """Whether a block of threads can do one head."""
    dim = ring.shape[-1]
    return tuning.shares_memory(ring.device) and dim % LANES == 0 and dim // BESIDE * LANES <= 1024


def conv_and_step(inputs: Column, history: Tensor, weight: Tensor, z: Column, b: Column, a: Column, ring: Tensor,
                  *given) -> Tensor:
    """`conv`, then `step`: `given` is what follows its ring. Where a block does one head, it makes that head's part of
    the convolution, too: one kernel less, and what it makes never leaves the block."""
    if by_blocks(ring) and inputs[0].shape[0] < min(ring.shape[0], MOST + 1):
        return by_heads(inputs, weight.shape[0], z, b, a, ring, *given, convolution=(history, weight))
    return step(conv(inputs, history, weight, given[-1]), z, b, a, ring, *given)


class Gates:
    """The numbers that token t of a head needs beside q, k and v, read inside a kernel."""

    def __init__(self, head: UOp, columns: dict[str, tuple[UOp, int]], dt_bias: UOp, decay: UOp):
        self.head, self.columns = head, columns
        self.dt_bias, self.decay = dt_bias.index(head).load(), decay.index(head).load()

    def read(self, name: str, t: int, at: UOp) -> UOp:
        buffer, first = self.columns[name]
        return buffer.index(const(t), at + first).load()

    def forget(self, t: int) -> UOp:
        """exp(g): what is kept of the memory."""
        x = self.read("a", t, self.head) + self.dt_bias
        softplus = x.maximum(0) + ((-x.maximum(-x)).exp() + 1).log()
        return (softplus * self.decay).exp()

    def strength(self, t: int) -> UOp:
        """beta: how much of the difference is written."""
        return self.read("b", t, self.head).sigmoid()


def one_token(gates: Gates, t: int, v: UOp, sums: list[UOp], scale: float) -> tuple[UOp, UOp, UOp]:
    """What follows from one pass over a column: sums of S·k, S·q, k·k, q·q, k·q with S the memory before the token.

    The new memory is keep * S + k * write, and the output is read from it without a second pass, since
    q·(keep S + k write) = keep (q·S) + (q·k) write. Returns keep, write, output.
    """
    sk, sq, kk, qq, kq = sums
    keep, k_norm, q_norm = gates.forget(t), (kk + 1e-6).rsqrt(), (qq + 1e-6).rsqrt() * scale
    delta = (v - keep * sk * k_norm) * gates.strength(t)
    return keep, delta * k_norm, (keep * sq + kq * k_norm * delta) * q_norm


def by_heads(qkv: Column, channels: int, z: Column, b: Column, a: Column, ring: Tensor, dt_bias: Tensor,
             decay: Tensor, norm: Tensor, eps: float, position: Tensor,
             convolution: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """`step` where threads share memory: a block a head; LANES threads share a column, each has some of its rows
    and BESIDE columns. qkv: what the convolution has made, or with `convolution` (history, weight) what it is to read.

    One kernel a token. Several in one would read the memory once for all of them, but with these lanes on an H100
    their registers spilled: two tokens took longer than two kernels.
    """
    tokens, (slots, heads, dim, _) = qkv[0].shape[0], ring.shape
    keys = (channels - heads * dim) // 2
    share, out, more = heads * dim // keys, result(tokens, heads * dim, like=ring), list(convolution or ())

    def kernel_of(t: int):
        def kernel(out: UOp, ring: UOp, *given: UOp) -> UOp:
            source, z_, b_, a_, dt_bias, decay, norm, position = given[len(more):]
            head, token, first = UOp.range(heads, 0), const(t), UOp.range(dim // BESIDE, 1, AxisType.LOCAL)
            lane, columns = UOp.range(LANES, 2, AxisType.LOCAL), [first * BESIDE + n for n in range(BESIDE)]
            gates = Gates(head, {"z": (z_, z[1]), "b": (b_, b[1]), "a": (a_, a[1])}, dt_bias, decay)
            rows = [lane * (dim // LANES) + j for j in range(dim // LANES)]
            memory = [[ring.index(slot_of(position, t, slots), head, row, column).load() for row in rows]
                      for column in columns]
            key, value, stores = head // share * dim, head * dim + 2 * keys, []
            if more:
                shared = shared_memory(2, LANES, dim)
                mine = (lane < 2).where(lane.minimum(1) * keys + key, value)        # lane 0: q, 1: k, others: v
                made = [convolved(given[0], source, given[1], mine + column, qkv[1], t, position)
                        for column in columns]
                shared = shared.after(UOp.barrier(*(shared.index(lane, column).store(x)
                                                  for column, (x, _) in zip(columns, made, strict=True))))
                q, k = ([shared.index(const(n), row).load() for row in rows] for n in range(2))
                v, stores = [shared.index(const(2), column).load() for column in columns], [store for _, store in made]
            else:
                q, k = ([source.index(token, key + row + at).load() for row in rows] for at in (0, keys))
                v = [source.index(token, value + column).load() for column in columns]
            sums, of_head = summed_over_lanes(memory, q, k, lane, columns, dim)
            found = [one_token(gates, t, x, [*mine, *of_head], dim ** -0.5) for x, mine in zip(v, sums, strict=True)]
            stores += [ring.index(slot_of(position, t + 1, slots), head, row, column).store(s * keep + x * write)
                       for column, old, (keep, write, _) in zip(columns, memory, found, strict=True)
                       for row, s, x in zip(rows, old, k, strict=True)]
            outs = [o for *_, o in found]
            square = mean_of_threads(sum(o * o for o in outs), first, dim // BESIDE) * (1 / BESIDE)
            for column, o in zip(columns, outs, strict=True):
                at = head * dim + column
                y = o * (square + eps).rsqrt() * norm.index(column).load() * gates.read("z", t, at).silu()
                stores.append(out.index(token, at).store(y))
            return UOp.group(*stores).end(head, first, lane).sink(
                arg=KernelInfo(f"{'conv_' if more else ''}delta_{heads}_{dim}", opts_to_apply=()))
        return kernel
    for t in range(tokens):
        out, ring, *rest = out.custom_kernel(ring, *more, qkv[0], z[0], b[0], a[0], dt_bias, decay, norm, position,
                                             fxn=kernel_of(t))
        more[:1] = rest[:1] if more else []
    return out


def convolved(history: UOp, source: UOp, weight: UOp, channel: UOp, first: int, t: int, position: UOp,
              ) -> tuple[UOp, UOp]:
    """What `conv` makes of one channel of token t, and the store of its input into the history. (Several heads share a
    key, and each stores that key's inputs: the same, and in a row that none of them reads.)"""
    width = weight.shape[1]
    past = [history.index(slot_of(position, s, HISTORY), channel).load() for s in range(t + 1 - width, 0)]
    new = [source.index(const(n), channel + first).load() for n in range(max(0, t + 1 - width), t + 1)]
    taps = [weight.index(channel, const(w)).load() for w in range(width)]
    return (sum(x * tap for x, tap in zip(past + new, taps, strict=True)).silu(),
            history.index(slot_of(position, t, HISTORY), channel).store(new[-1]))


def summed_over_lanes(memory: list[list[UOp]], q: list[UOp], k: list[UOp], lane: UOp, columns: list[UOp], dim: int,
                      ) -> tuple[list[list[UOp]], list[UOp]]:
    """Sums over all rows, of which each lane has some: S·k and S·q of each column (`memory`: its rows), and k·k, q·q,
    k·q of the head."""
    wide, narrow = shared_memory(0, 2, LANES, dim), shared_memory(1, 3, LANES)

    def product(a: list[UOp], b: list[UOp]) -> UOp:
        return sum(x * y for x, y in zip(a, b, strict=True))
    ready = UOp.barrier(
        *(wide.index(const(n), lane, column).store(product(old, x))
          for n, x in enumerate((k, q)) for column, old in zip(columns, memory, strict=True)),
        *(narrow.index(const(n), lane).store(product(*pair)) for n, pair in enumerate(((k, k), (q, q), (k, q)))))
    wide, narrow = wide.after(ready), narrow.after(ready)
    return ([[sum(wide.index(const(n), const(other), column).load() for other in range(LANES)) for n in range(2)]
             for column in columns],
            [sum(narrow.index(const(n), const(other)).load() for other in range(LANES)) for n in range(3)])


def by_columns(qkv: Tensor, z: Column, b: Column, a: Column, ring: Tensor, dt_bias: Tensor, decay: Tensor,
               norm: Tensor, eps: float, position: Tensor) -> Tensor:
    """`step` where no memory can be shared: one kernel a token, whose loop goes down a column, and then down again to
    write; the norm, which needs all columns of a head, comes after it in plain tensor code."""
    tokens, (slots, heads, dim, _) = qkv.shape[0], ring.shape
    keys = (qkv.shape[1] - heads * dim) // 2
    share, out = heads * dim // keys, result(tokens, heads, dim, like=qkv)
    opts = tuning.columns(qkv.device, 1, dim)

    def kernel_of(t: int):
        def kernel(out: UOp, ring: UOp, qkv: UOp, b_: UOp, a_: UOp, dt_bias: UOp, decay: UOp, position: UOp) -> UOp:
            head, column = UOp.range(heads, 0), UOp.range(dim, 1)
            row, again = counter(dim, 2), UOp.range(dim, 3)
            gates = Gates(head, {"b": (b_, b[1]), "a": (a_, a[1])}, dt_bias, decay)

            def parts(row: UOp) -> list[UOp]:                               # of the memory, k, q
                at = head // share * dim + row
                return [ring.index(slot_of(position, t, slots), head, row, column).load(),
                        qkv.index(const(t), at + keys).load(), qkv.index(const(t), at).load()]
            s, k, q = parts(row)
            sums = [added(x, row) for x in (s * k, s * q, k * k, q * q, k * q)]
            v = qkv.index(const(t), head * dim + column + 2 * keys).load()
            keep, write, o = one_token(gates, t, v, sums, dim ** -0.5)
            s, k, _ = parts(again)
            stored = ring.index(slot_of(position, t + 1, slots), head, again, column).store(s * keep + k * write)
            return UOp.group(stored.end(again), out.index(const(t), head, column).store(o)).end(head, column).sink(
                arg=KernelInfo(f"delta_column_{heads}_{dim}", opts_to_apply=opts))
        return kernel
    for t in range(tokens):
        out, ring = out.custom_kernel(ring, qkv, b[0], a[0], dt_bias, decay, position, fxn=kernel_of(t))[:2]
    gate = z[0][:, z[1]:z[1] + heads * dim].reshape(tokens, heads, dim)
    y = out * (out.square().mean(-1, keepdim=True) + eps).rsqrt() * norm * gate.silu()
    return y.reshape(tokens, heads * dim).contiguous()
