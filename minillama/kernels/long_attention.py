"""Attention of a few tokens over a long cache, on tensor cores: parts of the cache, each by a block of threads.

Much of a long text's step can go here, and little of that is reading: query heads that share keys multiply each of
them. So the heads are the eight columns of a tensor core's instruction (`mma.py`), and its sixteen rows are positions,
or, where values are weighed, dimensions. The caches are float32; keys, queries, values and weights go in as two halves
each, high and low, of which three products count.

A sum does not care about the order of its terms: of sixteen dimensions, or positions, each of the four lanes of a row
takes four that lie together. Source: Dao et al. 2023, "Flash-Decoding".
"""
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT, HALF, two_halves
from minillama.kernels.block import const, shared_memory
from minillama.kernels.mma import COLUMNS, LOW, ROWS, TERMS, WARP
from minillama.kernels.product import number, result
from minillama.kernels.softmax import NOWHERE, largest

LANES, FOUR = 4, 4      # that share a row; neighbours that one load brings
DIMS = 32               # dimensions whose values a warp weighs
SIDES = 2               # warps that divide the dimensions of the same keys between them
EIGHT, TWO = 8, 2       # values of the queries that a thread puts into halves; weights that it finds
APART = 4               # scores between the rows of two heads, so that they lie in other banks, and times 4 halves
AT_ONCE = 64            # parts that are summed up at once: they are many
LONG = 1536             # positions of a cache from which on it pays (an H200: after 100 tokens one takes 10.5 instead
                        # of 9.3 µs, after 600 as long as before, after 2,048 11 instead of 18)
SCORES, HIGHS, TOTALS, QUERIES, WEIGHTS = 0, 1, 2, 40, 42   # numbers of shared buffers; of the last ones two each
ZEROS = UOp.stack(*[UOp.const(0.0, FLOAT)] * 4)
Halves = tuple[list[UOp], list[UOp]]            # the high ones, the low ones


def fits(device: str, heads: int, kv_heads: int, dim: int, positions: int) -> bool:
    """Whether `parts` can, and had better, be used for a cache of so many positions and heads of that many dimensions.
    """
    return (positions >= LONG and tuning.uses_mma(device) and 2 <= heads // kv_heads <= COLUMNS
            and dim & dim - 1 == 0 and 2 * DIMS <= dim <= 256)


def size_of(dim: int) -> int:
    """Positions of a part: sixteen for every two warps."""
    return dim // DIMS // SIDES * ROWS


def halves_of(values: list[UOp], device: str) -> Halves:
    """Values as halves: value = high + low / LOW, up to 65,504 (larger ones are clamped)."""
    return tuple(map(list, zip(*(two_halves(value, LOW, device) for value in values), strict=True)))


def halves_in(number: int, size: int) -> list[UOp]:
    """Shared memory for the eight columns' halves, high ones and low ones."""
    return [UOp.placeholder((COLUMNS, size + 4 * APART), HALF, number + n, AddrSpace.LOCAL) for n in range(2)]


def rows_of(first: list[UOp], second: list[UOp]) -> list[UOp]:
    """Two rows of four terms each, in the order in which an instruction takes them."""
    return [*first[:2], *second[:2], *first[2:], *second[2:]]


def three_products(rows: Halves, columns: Halves, totals: tuple[UOp, UOp]) -> tuple[UOp, UOp]:
    """Totals and the products of halves: those of high ones, and those that are LOW times too large."""
    def added(a: list[UOp], b: list[UOp], total: UOp) -> UOp:
        return UOp.wmma(UOp.stack(*a), UOp.stack(*b), total, (COLUMNS, ROWS, TERMS), "CUDA", WARP)
    high, low = totals
    return added(rows[0], columns[0], high), added(rows[1], columns[0], added(rows[0], columns[1], low))


def together(totals: tuple[UOp, UOp]) -> list[UOp]:
    """A thread's four sums: of two rows and two columns."""
    return [totals[0].index(const(e)) + totals[1].index(const(e)) * (1 / LOW) for e in range(4)]


@dataclass(frozen=True)
class Part:
    """A block of threads and its part of the cache, for one token and the heads that share keys. `end`: positions that
    the token may see; `share`: heads."""
    device: str
    dim: int
    share: int
    token: UOp
    group: UOp
    number: UOp
    lane: UOp
    warp: UOp
    end: UOp

    @property
    def warps(self) -> int:
        return self.dim // DIMS

    @property
    def size(self) -> int:
        """Its positions."""
        return size_of(self.dim)

    @property
    def first(self) -> UOp:
        return self.number * self.size

    @property
    def line(self) -> UOp:
        """The thread's row among the first eight of an instruction, and its column."""
        return self.lane // LANES

    @property
    def four(self) -> UOp:
        """The first of its four terms among an instruction's sixteen."""
        return (self.lane & (LANES - 1)) * FOUR

    @property
    def thread(self) -> UOp:
        return self.warp * WARP + self.lane

    @property
    def finders(self) -> int:
        """Threads that find the weights of one head, TWO each."""
        return self.warps * WARP // COLUMNS

    def head(self, column: UOp) -> UOp:
        """The head in a column: of fewer than eight the last is done again."""
        return self.group * self.share + column.minimum(self.share - 1)

    def if_any(self, *rooms: UOp) -> list[UOp]:
        """The buffers, for a part that is not past the text's end: who has nothing to do need not wait for others."""
        if not tuning.is_cuda(self.device):
            return list(rooms)
        leave = UOp(Ops.CUSTOM, dtypes.void, (self.first < self.end,), "if (!{0}) return;")
        return [room.after(UOp.barrier(leave)) for room in rooms]

    def loaded(self, cache: UOp, place: UOp, start: UOp) -> list[UOp]:
        """Four neighbours of a position of the part, from a dimension on."""
        at = self.first + place
        return [cache.index(at.valid(at < self.end), self.group, start + n).load() for n in range(FOUR)]

    def scores(self, q: UOp, keys: UOp) -> list[UOp]:
        """Stores of the scores of all positions and heads in shared memory, a part of their sum a side. Queries go in
        as halves, for all threads; keys, sixteen positions a warp, are asked for at once."""
        row, place = self.thread // (self.dim // EIGHT), (self.thread & (self.dim // EIGHT - 1)) * EIGHT
        queries, stores, along = halves_in(QUERIES, self.dim), [], self.dim // SIDES
        some = [q.index(self.token, self.head(row), place + n).load() for n in range(EIGHT)]
        for room, half in zip(queries, halves_of(some, self.device), strict=True):
            stores += [room.index(row, place + n).store(value) for n, value in enumerate(half)]
        tile, side = self.warp // SIDES * ROWS + self.line, self.warp & (SIDES - 1)
        start = side * along + self.four
        rows = [rows_of(*(self.loaded(keys, tile + half, start + step) for half in (0, 8)))
                for step in range(0, along, TERMS)]
        ready = UOp.barrier(*stores, *(key for row in rows for key in row))
        queries, totals = [room.after(ready) for room in queries], (ZEROS, ZEROS)
        for n, keys_of in enumerate(rows):
            place = start + n * TERMS
            columns = tuple([room.index(self.line, place + k).load() for k in range(FOUR)] for room in queries)
            totals = three_products(halves_of(keys_of, self.device), columns, totals)
        shared = scores_in(self.size)
        return [shared.index(side, (self.lane & (LANES - 1)) * 2 + e % 2, tile + e // 2 * 8).store(score)
                for e, score in enumerate(together(totals))]

    def weights(self, shared: UOp) -> tuple[list[UOp], UOp, UOp]:
        """The weights of scores, as halves in shared memory; what each thread's add up to, there too; the thread's
        head's largest score. A thread finds two positions' of one head."""
        many = self.finders
        row, place = self.thread // many, (self.thread & (many - 1)) * TWO
        scores = [(self.first + place + n < self.end).where(sum(
            shared.index(const(side), row, place + n).load() for side in range(SIDES)) * self.dim ** -0.5, NOWHERE)
            for n in range(TWO)]
        highs = shared_memory(HIGHS, COLUMNS, many)
        highs = highs.after(UOp.barrier(highs.index(row, self.thread & (many - 1)).store(
            largest(scores, self.device))))
        high = largest([highs.index(row, const(n)).load() for n in range(many)], self.device)
        weights = [(score > NOWHERE / 2).where((score - high).exp(), 0.0) for score in scores]
        rooms = halves_in(WEIGHTS, self.size)
        stores = [room.index(row, place + n).store(half) for room, some in zip(
            rooms, halves_of(weights, self.device), strict=True) for n, half in enumerate(some)]
        sums = shared_memory(TOTALS, COLUMNS, many)
        ready = UOp.barrier(*stores, sums.index(row, self.thread & (many - 1)).store(sum(weights[1:], weights[0])))
        return [room.after(ready) for room in rooms], sums.after(ready), high

    def values(self, cache: UOp) -> list[list[list[UOp]]]:
        """The values of the thread's four dimensions, by sixteen positions and by its four of them."""
        return [[self.loaded(cache, const(n) + self.four + j, self.warp * DIMS + self.line * FOUR)
                 for j in range(FOUR)] for n in range(0, self.size, ROWS)]

    def weighed(self, values: list[list[list[UOp]]], rooms: list[UOp]) -> list[list[UOp]]:
        """Sums of values, weighed: of two pairs of dimensions, each for two heads (`together`)."""
        found = [(ZEROS, ZEROS), (ZEROS, ZEROS)]
        for n, some in enumerate(values):
            columns = tuple([room.index(self.line, n * ROWS + self.four + k).load() for k in range(FOUR)]
                            for room in rooms)
            for pair in range(2):
                dims = rows_of(*([v[pair * 2 + k] for v in some] for k in range(2)))
                found[pair] = three_products(halves_of(dims, self.device), columns, found[pair])
        return [together(totals) for totals in found]


def scores_in(size: int) -> UOp:
    """Shared memory for the scores of so many positions."""
    return shared_memory(SCORES, SIDES, COLUMNS, size + APART)


def parts(q: Tensor, keys: Tensor, values: Tensor, position: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What each of `count` parts finds for tokens from `position` (1,) int32 on: values weighed by it (tokens, heads,
    count, dim), and the logarithm of its weight (tokens, heads, count). Parts past the text's end may hold anything.

    q (tokens, heads, dim), keys and values (positions, kv_heads, dim), float32.
    """
    (tokens, heads, dim), (positions, kv_heads, _), device = q.shape, keys.shape, q.device
    blocks = -(-positions // size_of(dim))

    def kernel(out: UOp, best: UOp, q: UOp, keys: UOp, values: UOp, position: UOp) -> UOp:
        token, group, part = UOp.range(tokens, 0), UOp.range(kv_heads, 1), UOp.range(blocks, 2)
        lane, warp = UOp.range(WARP, 3, AxisType.LOCAL), UOp.range(dim // DIMS, 4, AxisType.LOCAL)
        end = number(position.index(const(0)), positions) + token + 1
        block = Part(device, dim, heads // kv_heads, token, group, part, lane, warp, end)
        q, keys, values = block.if_any(q, keys, values)
        stores, some = block.scores(q, keys), block.values(values)
        # half of the values are asked for before their weights are known (all would take too many registers)
        early = [value for dims in some[::2] for four in dims for value in four]
        rooms, sums, high = block.weights(scores_in(block.size).after(UOp.barrier(*stores, *early)))
        found = block.weighed(some, rooms)

        def weight_of(row: UOp) -> UOp:
            return sum(sums.index(row, const(n)).load() for n in range(block.finders))
        row = block.thread // block.finders
        stores = [best.index(token, block.head(row), part).store(high + weight_of(row).log())]
        for side in range(2):
            column = (lane & (LANES - 1)) * 2 + side
            once = 1 / weight_of(column)
            for pair, every in enumerate(found):
                stores += [out.index(token, block.head(column), part, warp * DIMS + block.line * FOUR + pair * 2 + k)
                           .store(every[2 * k + side] * once) for k in range(2)]
        return UOp.group(*stores).end(token, group, part, lane, warp).sink(
            arg=KernelInfo(f"attend_long_{tokens}_{heads}_{dim}_{positions}", opts_to_apply=()))
    out, best = (result(tokens, heads, count, *more, like=q) for more in ((dim,), ()))
    return out.custom_kernel(best, q, keys, values, position, fxn=kernel)[:2]
