"""Gated attention for a few tokens: rotate and store; where threads share memory, attend in parts, put together.

Plain tensor code takes about ten kernels, and those that sum over positions take them one after the other, since their
number is not known when they are compiled. Instead, the cache is split into parts of some positions; a block of
threads attends over one part, for all query heads that share its keys, and a last kernel weighs the parts' results.
Parts past the current position contribute nothing. Source: Dao et al. 2023, "Flash-Decoding"; Milakov & Gimelshein
2018 (online softmax).
"""
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama import program_cache
from minillama.kernels import long_attention, tuning
from minillama.kernels.block import const, mean_of_threads, shared_memory
from minillama.kernels.product import Column, number, result
from minillama.kernels.softmax import NOWHERE, largest, largest_of_threads
from minillama.kernels.steps import Steps
from minillama.kernels.sums import added
from minillama.kernels.tuning import fitting

program_cache.install()     # which counts loops of unknown length
PART, LARGE_PART = 16, 64       # positions of a part, in a cache of up to MANY positions and in a longer one, where
MANY = 8192             # what parts write and what is read again to sum it up counts for more than waiting (not
                        # measured: on CUDA `long_attention` does most long ones)
THREADS = 256           # of a block, and at least LANES that share a position, four neighbouring dimensions at a time
LANES = 8
SHARES = 4              # number of a shared buffer
AT_ONCE = 16            # parts that are summed up at once


def threads_of(share: int, dim: int, positions: int) -> tuple[int, int, int]:
    """Positions of a part, the lanes that share one, and how many scores each thread finds, for so many query heads
    that share keys. No lanes: they would want more memory than a block has."""
    size = PART if positions <= MANY else LARGE_PART
    lanes = fitting(max(LANES, THREADS // size), max(1, dim // 4))
    while lanes and 4 * share * (dim + lanes * size + 2 * size) > tuning.SHARED_ANYWHERE:
        lanes //= 2
    each = 1
    while lanes and each * lanes < share:
        each *= 2
    return size, lanes, each


def fits(heads: int, kv_heads: int, dim: int, positions: int) -> bool:
    """Whether `attend` can divide heads of that many dimensions among its threads, and the parts of a cache of so many
    positions have room in `summed`."""
    share = heads // kv_heads
    size, lanes, each = threads_of(share, dim, positions)
    parts = parts_of(positions, min(size, max(1, long_attention.size_of(dim))), dim)
    return (dim & dim - 1 == 0 and 4 <= dim <= 1024 and share * dim % 4 == 0 and 0 < lanes and each <= size
            and 4 * (parts + 2 * (dim + 8)) <= tuning.SHARED_ANYWHERE)


def rotated(x: Column, norm: Tensor, eps: float, table: Tensor, heads: int, stride: int, position: Tensor,
            out: Tensor, beside: tuple[Column, Tensor] | None = None) -> list[Tensor]:
    """RMS norm per head, then the rotary embedding, into `out`: (tokens, heads, dim), or with heads `beside` them, the
    rows of a cache (positions, heads, dim) from `position` (1,) int32 on. Those go as they are into a cache of theirs:
    values beside keys, (v, cache).

    A head's values lie at x + head * stride; table (positions, 2, half) holds all positions' cosines and sines. A
    block does one head of one token, or a loop does. Returns `out`, and the other cache where there is one.
    """
    source, first = x
    tokens, dim, half, device = source.shape[0], norm.shape[0], table.shape[-1], source.device
    more = [] if beside is None else [beside[1], beside[0][0]]
    name = f"rotate_{'store_' if more else ''}{tokens}_{heads}_{dim}"

    def by_threads(out: UOp, *given: UOp) -> UOp:
        source, norm, table, position = given[len(more) // 2:][:4]
        token, head, place = UOp.range(tokens, 0), UOp.range(heads, 1), UOp.range(dim, 2, AxisType.LOCAL)
        at, row = head * stride + first, number(position.index(const(0))) + token

        def value(place: UOp) -> UOp:
            return source.index(token, at + place).load() * norm.index(place).load()
        plain = source.index(token, at + place).load()
        scale = (mean_of_threads(plain * plain, place, dim) + eps).rsqrt()
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
        return UOp.group(*stores).end(place).end(token, head).sink(arg=KernelInfo(name, opts_to_apply=()))

    def by_loops(out: UOp, *given: UOp) -> UOp:
        source, norm, table, position = given[len(more) // 2:][:4]
        steps = Steps(device)
        token, head = steps.each(tokens, shared=tokens > tuning.FEW), steps.each(heads)
        at, row = head * stride + first, number(position.index(const(0)), table.shape[0] - tokens + 1) + token
        square = steps.sum(dim, lambda place: source.index(token, at + place).load().square())
        scale = (square * (1 / dim) + eps).rsqrt()

        def value(place: UOp) -> UOp:
            return source.index(token, at + place).load() * norm.index(place).load() * scale

        def store(place: UOp, y: UOp) -> UOp:
            return steps.now(out).index(row if more else token, head, place).store(y)
        place = steps.loop(half)
        a, b = value(place), value(place + half)
        cos, sin = (table.index(row, const(n), place).load() for n in range(2))
        steps.do((place,), store(place, a * cos - b * sin), store(place + half, b * cos + a * sin))
        if 2 * half < dim:
            place = steps.loop(dim - 2 * half)
            steps.do((place,), store(place + 2 * half, value(place + 2 * half)))
        if more:
            place = steps.loop(dim)
            as_it_is = given[-1].index(token, head * dim + place + beside[0][1]).load()
            steps.do((place,), steps.now(given[0]).index(row, head, place).store(as_it_is))
        return steps.kernel(name)
    kernel = by_threads if tuning.shares_memory(device) and dim <= 1024 else by_loops
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
    if not fits(heads, kv_heads, dim, positions):
        raise ValueError(f"{heads} heads on {kv_heads} of {dim} numbers, {positions} positions: too much for threads")
    if long_attention.fits(q.device, heads, kv_heads, dim, positions):
        size, at_once = long_attention.size_of(dim), long_attention.AT_ONCE
        found = long_attention.parts(q, keys, values, position, parts_of(positions, size, at_once))
        return summed(*found, gate, stride, position, size, positions, at_once)
    device, share = q.device, heads // kv_heads
    size, lanes, each = threads_of(share, dim, positions)
    here, threads = -(-positions // size), size * lanes
    teams = fitting(max(1, threads // dim), share)      # that divide the heads among them

    def part_kernel(out: UOp, best: UOp, q: UOp, keys: UOp, values: UOp, position: UOp) -> UOp:
        token, group, part = UOp.range(tokens, 0), UOp.range(kv_heads, 1), UOp.range(here, 2)
        thread = UOp.range(threads, 3, AxisType.LOCAL)
        end = number(position.index(const(0)), positions) + token + 1
        if tuning.is_cuda(device):        # who has nothing to do need not wait for what others do
            leave = UOp(Ops.CUSTOM, dtypes.void, (part * size < end,), "if (!{0}) return;")
            q, keys, values = (room.after(UOp.barrier(leave)) for room in (q, keys, values))
        # all heads' queries, for all threads
        queries, stores = shared_memory(3, share * dim), []
        for n in range(0, share * dim // 4, threads):
            cell = (n + thread).minimum(share * dim // 4 - 1)
            for k in range(4):
                value = q.index(token, group * share + cell // (dim // 4), (cell & (dim // 4 - 1)) * 4 + k).load()
                stores.append(queries.index(cell * 4 + k).store(value))
        # a position's key, by lanes; all positions' values, some dimensions a thread: asked for at once
        lane, place = thread & (lanes - 1), thread // lanes
        dims = [n + lane * 4 + k for n in range(0, dim, 4 * lanes) for k in range(4)]
        at = part * size + place
        key = [keys.index(at.valid(at < end), group, d).load() for d in dims]
        rows = [part * size + p for p in range(size)]
        mine = [thread & (dim - 1)] if dim <= threads else [thread + d for d in range(0, dim, threads)]
        value = [[values.index(at.valid(at < end), group, d).load() for at in rows] for d in mine]
        queries = queries.after(UOp.barrier(*stores, *key, *sum(value, [])))
        # the products of the key with all queries: each lane finds a part
        found = [sum(queries.index(h * dim + d).load() * k for d, k in zip(dims, key, strict=True))
                 for h in range(share)]
        shared = shared_memory(0, lanes, share, size)
        stores = [shared.index(lane, const(h), place).store(x) for h, x in enumerate(found)]
        shared = shared.after(UOp.barrier(*stores))
        # scores: some positions of one head a thread
        head, scores, own = (thread * each // size).minimum(share - 1), shared_memory(1, share, size), []
        for n in range(each):
            place = (thread * each + n) & (size - 1)
            score = sum(shared.index(const(other), head, place).load() for other in range(lanes)) * dim ** -0.5
            own.append((place, (part * size + place < end).where(score, NOWHERE)))
        scores = scores.after(UOp.barrier(*(scores.index(head, place).store(score) for place, score in own)))
        # weights: how much each position counts
        every = [scores.index(head, const(n)).load() for n in range(size)]
        high = largest(every, device)

        def weight(score: UOp) -> UOp:
            return (score > NOWHERE / 2).where((score - high).exp(), 0.0)
        total, weights = sum(weight(score) for score in every), shared_memory(2, share, size)
        weights = weights.after(UOp.barrier(*(weights.index(head, place).store(weight(score) / total)
                                              for place, score in own)))
        # the weighed sum of values, for some of the heads (what threads are left over do what others do, too)
        team, stores = (thread // dim).minimum(teams - 1), []
        for d, column in zip(mine, value, strict=True):
            for h in (team * (share // teams) + n for n in range(share // teams)):
                stores.append(out.index(token, group * share + h, part, d).store(
                    sum(weights.index(h, const(p)).load() * v for p, v in enumerate(column))))
        return UOp.group(*stores, best.index(token, group * share + head, part).store(high + total.log())).end(
            token, group, part, thread).sink(
            arg=KernelInfo(f"attend_{tokens}_{heads}_{dim}_{positions}", opts_to_apply=()))

    # what each part found: weighed values (tokens, heads, parts, dim), and the logarithm of their weight
    found, best = (result(tokens, heads, parts_of(positions, size, AT_ONCE), *more, like=q) for more in ((dim,), ()))
    found, best = found.custom_kernel(best, q, keys, values, position, fxn=part_kernel)[:2]
    return summed(found, best, gate, stride, position, size, positions, AT_ONCE)


def parts_of(positions: int, size: int, at_once: int) -> int:
    """How many parts of `size` positions `summed` reads."""
    here = -(-positions // size)
    return here + -here % at_once


def summed(found: Tensor, best: Tensor, gate: Column, stride: int, position: Tensor, size: int, positions: int,
           at_once: int) -> Tensor:
    """What parts of `size` positions found, put together, times sigmoid(gate): (tokens, heads * dim). found (tokens,
    heads, parts, dim): weighed values; best (tokens, heads, parts): the logarithms of their weight. `at_once`: parts
    that are summed up at once, so that a thread waits once for all of them."""
    (tokens, heads, parts, dim), device = found.shape, found.device

    def sum_kernel(out: UOp, found: UOp, best: UOp, gate_: UOp, position: UOp) -> UOp:
        token, head, d = UOp.range(tokens, 0), UOp.range(heads, 1), UOp.range(dim, 2, AxisType.LOCAL)
        start = number(position.index(const(0)), positions)
        count = (start + token + size) // size          # parts that found something for this token
        # how much each part counts: some of them a thread
        own = [d + n for n in range(0, parts, dim)]
        scores = [(part < count).where(best.index(token, head, part.minimum(parts - 1)).load(), NOWHERE)
                  for part in own]
        high = largest_of_threads(largest(scores, device), d, dim, device)
        weights = [(score > NOWHERE / 2).where((score - high).exp(), 0.0) for score in scores]
        total, shares = mean_of_threads(sum(weights), d, dim) * dim, shared_memory(SHARES, len(own) * dim)
        shares = shares.after(UOp.barrier(*(
            shares.index(part).store(weight) for part, weight in zip(own, weights, strict=True))))
        # their weighed sum
        turns = (start + (tokens - 1 + size * at_once)) // (size * at_once)
        i = UOp.range(turns, 3, AxisType.REDUCE) if parts > at_once else const(0)
        each = [i * at_once + n for n in range(at_once)]
        values = [(part < count).where(found.index(token, head, part, d).load(), 0.0) for part in each]
        y = added(sum(value * shares.index(part).load() for part, value in zip(each, values, strict=True)), i) / total
        open_ = gate_.index(token, head * stride + d + gate[1]).load().sigmoid()
        return out.index(token, head * dim + d).store(y * open_).end(token, head, d).sink(
            arg=KernelInfo(f"attended_{tokens}_{heads}_{dim}_{parts}", opts_to_apply=()))
    return result(tokens, heads * dim, like=found).custom_kernel(found, best, gate[0], position, fxn=sum_kernel)[0]
