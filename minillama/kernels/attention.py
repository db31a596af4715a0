"""Gated attention for a few tokens: rotate and store; where threads share memory, attend in parts, put together.

Plain tensor code takes about ten kernels, and those that sum over positions take them one after the other, since their
number is not known when they are compiled. Instead, the cache is cut into parts of some positions; a block of threads
attends over one part, for all query heads that share its keys, and what the parts found is weighed at the end. Parts
behind the text find nothing. Source: Dao et al. 2023, "Flash-Decoding"; Milakov & Gimelshein 2018 (online softmax).
"""
from tinygrad import Tensor
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.block import const, mean_of_threads, shared_memory
from minillama.kernels.product import Column, number, result
from minillama.kernels.sums import added, counter
from minillama.kernels.tuning import fitting

PART = 64           # positions of a part, at most
TURN = 8            # positions that a loop takes at once, so that it waits once for all of them
PARTS_AT_ONCE = 16  # the same of parts
SQUADS = 4          # times as many threads, each for some of the heads
THREADS = 128       # that work on it, at most: no more than a head has dimensions
NOWHERE = -1e30     # a score that weighs nothing


def fits(heads: int, kv_heads: int, dim: int) -> bool:
    """Whether `attend` can divide heads of that many dimensions among its threads."""
    threads = min(THREADS, dim)
    size, share = min(PART, threads), heads // kv_heads
    lanes = threads // size
    whole = (threads % size, dim % threads, dim // lanes % 4, threads % share, size * share % threads,
             size % max(1, threads // share))
    return not any(whole) and dim <= 1024       # of a block, and `rotated` has a thread for each dimension


def rotated(x: Column, norm: Tensor, eps: float, table: Tensor, heads: int, stride: int, position: Tensor,
            out: Tensor, beside: tuple[Column, Tensor] | None = None) -> list[Tensor]:
    """RMS norm per head, then the rotary embedding, into `out`: (tokens, heads, dim), or with heads `beside` them, the
    rows of a cache (positions, heads, dim) from `position` (1,) int32 on. Those go as they are into a cache of theirs:
    values beside keys, (v, cache).

    A head's values lie at x + head * stride; table (positions, 2, half) holds all positions' cosines and sines. A
    block does one head of one token, or a loop does. Returns `out`, and the other cache where there is one.
    """
    source, first = x
    tokens, dim, half = source.shape[0], norm.shape[0], table.shape[-1]
    more = [] if beside is None else [beside[1], beside[0][0]]
    together = tuning.shares_memory(source.device) and dim <= 1024

    def kernel(out: UOp, *given: UOp) -> UOp:
        source, norm, table, position = given[len(more) // 2:][:4]
        token, head = UOp.range(tokens, 0), UOp.range(heads, 1)
        place = UOp.range(dim, 2, AxisType.LOCAL if together else AxisType.WEAK)
        term = place if together else counter(dim, 3)
        at, row = head * stride + first, number(position.index(const(0))) + token

        def value(place: UOp) -> UOp:
            return source.index(token, at + place).load() * norm.index(place).load()
        plain = source.index(token, at + term).load()
        square = mean_of_threads(plain * plain, place, dim) if together else added(plain * plain, term) * (1 / dim)
        scale = (square + eps).rsqrt()
        left, turned = place < half, place < 2 * half
        other = turned.where(left.where(place + half, place - half), place)
        angle = turned.where(left.where(place, place - half), const(0))
        cos, sin = table.index(row, const(0), angle).load(), table.index(row, const(1), angle).load()
        turn = value(place) * cos + value(other) * left.where(-sin, sin)
        y = turned.where(turn, value(place)) * scale
        stores = [out.index(row if more else token, head, place).store(y)]
        if more:
            as_it_is = given[-1].index(token, head * dim + place + beside[0][1]).load()
            stores.append(given[0].index(row, head, place).store(as_it_is))
        return UOp.group(*stores).end(place).end(token, head).sink(
            arg=KernelInfo(f"rotate_{'store_' if more else ''}{tokens}_{heads}_{dim}", opts_to_apply=()))
    return out.custom_kernel(*more[:1], source, norm, table, position, *more[1:], fxn=kernel)[:1 + len(more) // 2]


def attend_twin(q: Tensor, keys: Tensor, values: Tensor, gate: Tensor, position: int) -> Tensor:
    """Causal attention of tokens from `position` on over a cache, times sigmoid(gate): (tokens, heads * dim).

    q (tokens, heads, dim); keys, values (positions, kv_heads, dim); gate (tokens, heads, dim).
    """
    tokens, heads, dim = q.shape
    share = heads // keys.shape[1]
    keys, values = (x.repeat_interleave(share, dim=1).permute(1, 0, 2) for x in (keys, values))     # (heads, .., dim)
    scores = q.permute(1, 0, 2) @ keys.transpose(1, 2) * dim ** -0.5        # (heads, tokens, positions)
    seen = Tensor.arange(keys.shape[1]).reshape(1, -1) <= Tensor.arange(tokens).reshape(-1, 1) + position
    out = seen.where(scores, NOWHERE).softmax(-1) @ values                  # (heads, tokens, dim)
    return (out.permute(1, 0, 2) * gate.sigmoid()).reshape(tokens, heads * dim)


def attend(q: Tensor, keys: Tensor, values: Tensor, gate: Column, stride: int, position: Tensor) -> Tensor:
    """As `attend_twin`; the gate of a head lies at gate + head * stride. In two kernels: parts, and their sum. Raises
    ValueError for heads that do not `fits`."""
    (tokens, heads, dim), (positions, kv_heads, _) = q.shape, keys.shape
    if not fits(heads, kv_heads, dim):
        raise ValueError(f"{heads} heads on {kv_heads} of {dim} dimensions cannot be divided among threads")
    threads = min(THREADS, dim)
    size, share = min(PART, threads), heads // kv_heads
    parts, lanes = -(-positions // size), threads // size       # a position has so many threads
    parts += -parts % min(parts, PARTS_AT_ONCE)
    per, team, mine = dim // lanes, threads // share, size * share // threads   # dimensions; threads of a head; places
    wide, turn = fitting(16, per), fitting(TURN, size)          # dimensions and positions that are read at once
    squads = fitting(SQUADS, share)                             # that divide the heads among them

    def part_kernel(out: UOp, best: UOp, weight: UOp, q: UOp, keys: UOp, values: UOp, position: UOp) -> UOp:
        token, group, part = UOp.range(tokens, 0), UOp.range(kv_heads, 1), UOp.range(parts, 2)
        # a thread's place: `team` members a head, so many crews of them, lanes of a position, squads of heads
        member, crew, lane, squad = (UOp.range(count, 3 + n, AxisType.LOCAL)
                                     for n, count in enumerate((team, size // team, lanes, squads)))
        heads_here = [squad * (share // squads) + h for h in range(share // squads)]
        end = number(position.index(const(0))) + token + 1
        # scores of the part's positions: `lanes` threads each take a share of the dimensions
        row, head = crew * team + member, lane * (size // team) + crew
        thread = head * team + member
        at, i = part * size + row, counter(per // wide, 7)
        dims = [lane * per + i * wide + k for k in range(wide)]
        key = [keys.index(at.valid(at < end), group, d).load() for d in dims]
        sums = [added(sum(q.index(token, group * share + h, d).load() * k for d, k in zip(dims, key, strict=True)), i)
                for h in heads_here]
        board = shared_memory(0, lanes, share, size)
        ready = UOp.barrier(*(board.index(lane, h, row).store(s) for h, s in zip(heads_here, sums, strict=True)))
        board = board.after(ready)
        # the largest score and the weights: `team` threads a head, `mine` positions each (all squads the same)
        places = [member * mine + n for n in range(mine)]
        scores = [(part * size + place < end).where(
            sum(board.index(const(n), head, place).load() for n in range(lanes)) * dim ** -0.5, NOWHERE)
            for place in places]
        highs, total = shared_memory(1, share, team), shared_memory(2, share, team)
        high = scores[0]
        for score in scores[1:]:
            high = high.maximum(score)
        met = UOp.barrier(highs.index(head, member).store(high))
        for n in range(team):
            high = high.maximum(highs.after(met).index(head, const(n)).load())
        shares = [(score > NOWHERE / 2).where((score - high).exp(), 0.0) for score in scores]
        weights = shared_memory(3, share, size)
        done = UOp.barrier(total.index(head, member).store(sum(shares[1:], shares[0])),
                           *(weights.index(head, place).store(s) for place, s in zip(places, shares, strict=True)))
        weighed = sum(total.after(done).index(head, const(n)).load() for n in range(team))
        # the weighed sum of values: each thread its dimensions, for all heads
        i, weights, stores = counter(size // turn, 8), weights.after(done), []
        places = [i * turn + n for n in range(turn)]
        for d in (thread + n * threads for n in range(dim // threads)):
            value = [values.index((part * size + p).valid(part * size + p < end), group, d).load() for p in places]
            stores += [out.index(token, group * share + h, part, d).store(added(
                sum(weights.index(h, p).load() * v for p, v in zip(places, value, strict=True)), i))
                for h in heads_here]
        here = (token, group * share + head, part)
        return UOp.group(*stores, best.index(*here).store(high), weight.index(*here).store(weighed)).end(
            token, group, part, member, crew, lane, squad).sink(
            arg=KernelInfo(f"attend_{tokens}_{heads}_{dim}_{positions}", opts_to_apply=()))

    def sum_kernel(out: UOp, found: UOp, best: UOp, weight: UOp, gate_: UOp) -> UOp:
        token, head, d = UOp.range(tokens, 0), UOp.range(heads, 1), UOp.range(dim, 2, AxisType.LOCAL)
        some = min(parts, PARTS_AT_ONCE)
        first, i = counter(parts // some, 3), counter(parts // some, 4)
        high, *more = (best.index(token, head, first * some + n).load() for n in range(some))
        for one in more:
            high = high.maximum(one)
        high = high.reduce(first, arg=Ops.MAX) if parts > some else high
        now = [i * some + n for n in range(some)]
        shares = [(best.index(token, head, part).load() - high).exp() for part in now]
        y = added(sum(found.index(token, head, part, d).load() * s for part, s in zip(now, shares, strict=True)), i)
        y = y / added(sum(weight.index(token, head, part).load() * s for part, s in zip(now, shares, strict=True)), i)
        open_ = gate_.index(token, head * stride + d + gate[1]).load().sigmoid()
        return out.index(token, head * dim + d).store(y * open_).end(token, head, d).sink(
            arg=KernelInfo(f"attended_{tokens}_{heads}_{dim}_{parts}", opts_to_apply=()))
    found, best, weight = (result(tokens, heads, parts, *more, like=q) for more in ((dim,), (), ()))
    found, best, weight = found.custom_kernel(best, weight, q, keys, values, position, fxn=part_kernel)[:3]
    return result(tokens, heads * dim, like=q).custom_kernel(found, best, weight, gate[0], fxn=sum_kernel)[0]
