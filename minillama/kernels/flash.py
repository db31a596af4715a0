"""Attention for a prompt on tensor cores: scores never leave the block of threads that finds them.

A block has some rows, queries of neighbouring tokens whose heads share their keys, and goes through the cache in tiles
of positions, in one pass: it keeps the largest score so far, the sum of the weights and the sum of the weighed values,
and when a larger score turns up, it scales both sums down. Source: Milakov & Gimelshein 2018 (online softmax); Dao
2023, "FlashAttention-2". Several blocks divide the tiles of the same rows among them ("Flash-Decoding"), so that there
are enough for a whole GPU; a last kernel puts their parts together, and gates.

In the first product of a tile each warp takes 16 of its positions, for all rows; in the second one some of the
dimensions, for all rows and positions. So each key and each value is needed by one warp only, which reads it without a
detour through shared memory, where only weights, largest scores and, at the end, sums meet. For that, kernels before
it put queries, keys and values into the order in which tensor cores take them (`flash_cells.py`).
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tinygrad import Tensor
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import AxisType, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import BITS, FLOAT, WORD, as_halves
from minillama.kernels.block import const, shared_memory
from minillama.kernels.flash_cells import (
    DOWN,
    UP,
    WORDS,
    FlashTiling,
    ended,
    lanes,
    past,
    put,
    queries,
    tiling,
    words_of,
)
from minillama.kernels.mma import COLUMNS, LOW, ROWS, TERMS, WARP
from minillama.kernels.product import Column, number, result
from minillama.kernels.softmax import NOWHERE, largest
from minillama.kernels.staging import neighbours

RAISED = 15         # weights go in 2^15 times as large: the largest half is 65,504
LOG2E = 1.4426950408889634
WEIGHTS, SUMS, TOTALS = 40, 41, 1002    # numbers of buffers


def fits(device: str, tokens: int, heads: int, kv_heads: int, dim: int, positions: int) -> bool:
    """Whether `attend` can do so many queries over a cache of so many positions."""
    return tuning.uses_mma(device) and tiling(tokens, heads, kv_heads, dim, positions) is not None


# ---- a block of threads -------------------------------------------------------------------------------------------


def multiplied(rows: list[UOp], columns: list[UOp], total: UOp, device: str) -> UOp:
    """A total and a product of 16 rows and 8 columns, 16 terms each; a lane's words of both."""
    first, second = UOp.stack(*as_halves(rows, device)), UOp.stack(*as_halves(columns, device))
    return UOp.wmma(first, second, total, (COLUMNS, ROWS, TERMS), "CUDA", WARP)


def scaled_down(words: list[UOp], device: str) -> list[UOp]:
    """Pairs of halves divided by LOW."""
    bits = [(half * (1 / LOW)).bitcast(BITS).cast(WORD) for half in as_halves(words, device)]
    return [bits[n] | bits[n + 1] << 16 for n in range(0, len(bits), 2)]


@dataclass(frozen=True)
class Block:
    """A block of threads with its rows, for a prompt of so many tokens. A thread has two rows of every 16 (`rows`)."""
    cut: FlashTiling
    tokens: int
    heads: int
    kv_heads: int
    dim: int
    device: str

    @cached_property
    def place(self) -> tuple[UOp, UOp, UOp]:
        """Which of the parts the block does, of which rows, of which heads that share keys."""
        rows = self.tokens * self.share // self.cut.rows
        return tuple(UOp.range(size, n) if size > 1 else const(0) for n, size in enumerate(
            (self.cut.parts, rows, self.kv_heads)))

    @cached_property
    def threads(self) -> tuple[UOp, UOp, UOp, UOp]:
        return lanes(self.cut.warps, 3)

    @property
    def share(self) -> int:
        """Heads that share their keys."""
        return self.heads // self.kv_heads

    @property
    def tiles(self) -> int:
        """Times 16 rows."""
        return self.cut.rows // ROWS

    @property
    def columns(self) -> int:
        """Times 8 dimensions whose sums a warp has."""
        return self.dim // COLUMNS // self.cut.warps

    @property
    def rows(self) -> list[UOp]:
        """The thread's rows, in the block."""
        return [m * ROWS + half * COLUMNS + self.threads[2] for m in range(self.tiles) for half in range(2)]

    def scores(self, queries: UOp, keys: UOp, tile: UOp, first: UOp) -> list[list[UOp]]:
        """Of each of the thread's rows its four scores of a tile's positions, as exponents of 2. `first`: the position
        of the block's first row. Where a row does not see a position, its sum starts at NOWHERE."""
        (_, block, group), (lane, warp, _, share), steps = self.place, self.threads, self.dim // TERMS
        factor = self.dim ** -0.5 * LOG2E / (UP * UP)
        tokens = [first + row // self.share for row in self.rows]
        found = []
        for m in range(self.tiles):
            found.append([])
            for n in range(2):
                at = [tile * self.cut.size + warp * TERMS + n * COLUMNS + share * 2 + e for e in range(2)]
                found[-1].append(UOp.stack(*((at[e % 2] <= tokens[2 * m + e // 2]).where(
                    UOp.const(0.0, FLOAT), NOWHERE / factor) for e in range(4))))
        for step in range(steps):
            cell = ((tile * self.cut.warps + warp) * self.kv_heads + group) * steps + step
            mine = [neighbours(keys, (cell * 2 + n) * WARP + lane, WORDS) for n in range(2)]
            for m in range(self.tiles):
                row = group * (self.tokens * self.share // ROWS) + block * self.tiles + m
                high, low = (neighbours(queries, ((row * steps + step) * 2 + part) * WARP + lane, WORDS)
                             for part in range(2))
                for n in range(2):
                    for asked, key in ((high, mine[n][:2]), (high, mine[n][2:]), (low, mine[n][:2])):
                        found[m][n] = multiplied(asked, key, found[m][n], self.device)
        return [[found[m][n].index(const(2 * half + e)) * factor for n in range(2) for e in range(2)]
                for m in range(self.tiles) for half in range(2)]

    def values(self, values: UOp, tile: UOp, step: int) -> list[list[UOp]]:
        """The words of values at 16 positions of a tile, for each of the warp's 8 dimensions."""
        cell = ((tile * self.cut.warps + step) * self.kv_heads + self.place[2]) * (self.dim // COLUMNS)
        lane, warp = self.threads[:2]
        return [neighbours(values, (cell + warp * self.columns + c) * WARP + lane, WORDS) for c in range(self.columns)]

    def told(self, room: UOp, numbers: list[UOp], place: UOp, *before: UOp) -> list[list[UOp]]:
        """What all threads that share a row say of it, for each of this thread's rows; `place`: where, among the four
        of a warp, this one says it. `before`: loads to be issued before threads wait for each other."""
        warp = self.threads[1]
        stores = [room.index(row, warp * 4 + place).store(x) for row, x in zip(self.rows, numbers, strict=True)]
        room = room.after(UOp.barrier(*stores, *before))
        return [[room.index(row, const(k)).load() for k in range(4 * self.cut.warps)] for row in self.rows]

    def shared_weights(self, weights: list[list[UOp]]) -> UOp:
        """The weights of all threads in shared memory, as cells: (warps, times 16 rows, high and low)."""
        shared = UOp.placeholder((self.cut.rows * self.cut.size,), WORD, WEIGHTS, AddrSpace.LOCAL)
        (lane, warp, *_), stores = self.threads, []
        for m in range(self.tiles):
            pairs = [(row[n], row[n + 1]) for n in (0, 2) for row in weights[2 * m:2 * m + 2]]
            words = words_of(pairs, 1.0, self.device)
            for low in range(2):
                cell = ((warp * self.tiles + m) * 2 + low) * WARP + lane
                stores += put(shared, cell, words[low * WORDS:][:WORDS])
        return shared.after(UOp.barrier(*stores))

    def weighed(self, shared: UOp, values: Callable[[int], list[list[UOp]]], sums: list[list[UOp]]) -> list[UOp]:
        """The sums (times 16 rows, times 8 dimensions) and a tile's weighed values, one number after the other.
        `values` (step) -> as they are for 16 positions."""
        for step in range(self.cut.warps):
            mine = values(step)
            for m in range(self.tiles):
                high, low = (neighbours(shared, ((step * self.tiles + m) * 2 + n) * WARP + self.threads[0], WORDS)
                             for n in range(2))
                less = scaled_down(high, self.device)
                for c, words in enumerate(mine):
                    for weights, value in ((high, words[:2]), (low, words[:2]), (less, words[2:])):
                        sums[m][c] = multiplied(weights, value, sums[m][c], self.device)
        return [total.index(const(e)) for row in sums for total in row for e in range(4)]


# ---- attention ----------------------------------------------------------------------------------------------------


def attend(q: Tensor, keys: Tensor, values: Tensor, gate: Column, stride: int, position: Tensor,
           cut: FlashTiling | None = None) -> Tensor:
    """Causal attention of tokens from `position` (1,) int32 on over a cache, times sigmoid(gate): (tokens, heads *
    dim). Arguments and result as `attention.attend`; whatever lies behind the text in the cache counts for nothing."""
    (tokens, heads, dim), (positions, kv_heads, _), device = q.shape, keys.shape, q.device
    cut = cut or tiling(tokens, heads, kv_heads, dim, positions)
    if cut is None:
        raise ValueError(f"{tokens} tokens, {heads} heads on {kv_heads} of {dim} dimensions: no tiles divide them")
    work, most = Block(cut, tokens, heads, kv_heads, dim, device), -(-positions // cut.size)
    k, v = past(keys, values, position, tokens, cut.warps)
    found = [result(tokens, heads, cut.parts, *more, like=q) for more in ((dim,), (), ())]
    found = found[0].custom_kernel(*found[1:], queries(q, kv_heads), k, v, position, fxn=lambda *buffers: part_kernel(
        work, positions, most, *buffers))[:3]
    return put_together(found, gate, stride)


def part_kernel(work: Block, positions: int, most: int, out: UOp, best: UOp, total: UOp, queries: UOp, keys: UOp,
                values: UOp, position: UOp) -> UOp:
    """What each block finds in its part of the tiles, of which there are at most so many: sums of weighed values, the
    largest score, the sum of weights."""
    cut, (part, block, group), (_, warp, _, share) = work.cut, work.place, work.threads
    parts, tokens, count = cut.parts, cut.rows // work.share, work.tiles * work.columns * 4
    first = number(position.index(const(0)), positions) + block * tokens
    tiles = (first + (tokens + cut.size - 1)).minimum(most * cut.size) // cut.size      # up to its last token
    i = UOp.range((tiles + (parts - 1) - part) // parts, 5, AxisType.REDUCE)
    tile, rows = i * parts + part, 2 * work.tiles
    # carried from tile to tile: sums of values, the largest scores, sums of weights
    totals = UOp.placeholder((count + 2 * rows,), FLOAT, TOTALS, AddrSpace.REG)
    starts = [0.0] * count + [NOWHERE] * rows + [0.0] * rows
    totals = totals.after(*(totals.index(const(n)).store(UOp.const(x, FLOAT)) for n, x in enumerate(starts)))
    old = [totals.after(i).index(const(n)).load() for n in range(len(starts))]
    scores = work.scores(queries.after(i), keys.after(i), tile, first)
    soon = work.values(values.after(i), tile, 0)        # asked for before threads wait for each other
    room = shared_memory(SUMS, cut.rows, cut.stride)
    highs = [largest([before, *row], work.device) for before, row in zip(old[count:], work.told(
        room, [largest(row, work.device) for row in scores], share, *sum(soon, [])), strict=False)]
    fade = [(before - high).exp2() for before, high in zip(old[count:], highs, strict=False)]
    weights = [[(score - (high - RAISED)).exp2() for score in row] for high, row in zip(highs, scores, strict=True)]
    shared = work.shared_weights(weights)
    sums = [[UOp.stack(*(old[(m * work.columns + c) * 4 + e] * fade[2 * m + e // 2] for e in range(4)))
             for c in range(work.columns)] for m in range(work.tiles)]
    new = work.weighed(shared, lambda step: work.values(values.after(i), tile, step) if step else soon, sums)
    new += highs + [before * less + sum(row) for before, less, row in zip(
        old[count + rows:], fade, weights, strict=True)]
    totals = totals.after(UOp.group(*(totals.index(const(n)).store(x) for n, x in enumerate(new))).end(i))
    done = [totals.index(const(n)).load() for n in range(len(starts))]
    told = work.told(room, done[count + rows:], 3 - share)      # tinygrad wants no place to be stored to twice
    stores = []
    for n, local in enumerate(work.rows):
        row = block * cut.rows + local
        at = row // work.share, group * work.share + (row & (work.share - 1)), part
        stores += [best.index(*at).store(done[count + n]), total.index(*at).store(sum(told[n]))]
        for c in range(work.columns):
            stores += [out.index(*at, (warp * work.columns + c) * COLUMNS + share * 2 + e).store(
                done[(n // 2 * work.columns + c) * 4 + n % 2 * 2 + e]) for e in range(2)]
    name = f"flash_{work.tokens}_{work.heads}_{work.dim}_{positions}"
    return ended(name, stores, *work.place, *work.threads[:2])


def put_together(found: list[Tensor], gate: Column, stride: int) -> Tensor:
    """The parts of `part_kernel` put together and gated: (tokens, heads * dim)."""
    tokens, heads, parts, dim = found[0].shape

    def kernel(y: UOp, out: UOp, best: UOp, total: UOp, beside: UOp) -> UOp:
        token, head, d = UOp.range(tokens, 0), UOp.range(heads, 1), UOp.range(dim, 2, AxisType.LOCAL)
        highs = [best.index(token, head, const(n)).load() for n in range(parts)]
        high = largest(highs, found[0].device)
        shares = [(one - high).exp2() for one in highs]
        weight = sum(total.index(token, head, const(n)).load() * share for n, share in enumerate(shares))
        value = sum(out.index(token, head, const(n), d).load() * share for n, share in enumerate(shares))
        open_ = beside.index(token, head * stride + d + gate[1]).load().sigmoid()
        return ended(f"flash_sum_{tokens}_{heads}_{dim}_{parts}", [
            y.index(token, head * dim + d).store(value / (weight * DOWN) * open_)], token, head, d)
    return result(tokens, heads * dim, like=found[0]).custom_kernel(*found, gate[0], fxn=kernel)[0]
