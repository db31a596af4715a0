"""What attention for a prompt multiplies, put into the order in which tensor cores take it (`flash.py`).

A *cell* is what the 32 lanes of a warp have of one factor: four words each, which a lane reads at once; a word is a
pair of halves. A half holds 11 bits, so all factors go in as two of them, x = high + low. Queries and keys are normed,
and weights lie between 0 and 1: scaled up, they leave low halves precise enough as they are. Those of values are
scaled by LOW, since nothing is known of how large values are.
"""
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import BITS, WORD, two_halves
from minillama.kernels.block import const
from minillama.kernels.mma import COLUMNS, LOW, ROWS, TERMS, WARP
from minillama.kernels.product import number
from minillama.kernels.tuning import fitting

UP = 16.0           # queries and keys go in so many times as large: they may be as large as 4,094
DOWN = 1 / 16       # values smaller: up to a million
WORDS = 4           # of a cell and lane
BLOCKS = 264        # wanted of a kernel: two for each multiprocessor of an H200


@dataclass(frozen=True)
class FlashTiling:
    """How attention is tiled: rows of a block, a multiple of 16; its warps, each with 16 positions of a tile; and how
    many blocks divide the tiles of the same rows among them."""
    rows: int
    warps: int
    parts: int

    @property
    def size(self) -> int:
        """Positions of a tile."""
        return self.warps * TERMS

    @property
    def shared(self) -> int:
        """Bytes of shared memory: weights as two halves, and a number of each thread that has a row's scores."""
        return self.rows * 4 * (self.size + self.stride)

    @property
    def stride(self) -> int:
        """Numbers from row to row of what lanes tell each other, so that rows lie in different banks."""
        return 4 * self.warps + 4


def tiling(tokens: int, heads: int, kv_heads: int, dim: int, positions: int) -> FlashTiling | None:
    """The tiling for a prompt of so many tokens; None where it cannot be cut so. (On an H200, for 512 tokens at 0 and
    at 2,048, within 1 % of the fastest of six; with four parts 4 % faster at 16,384, and 15 % slower at 0.)"""
    share, warps = heads // kv_heads, fitting(4, max(1, dim // COLUMNS))
    rows = fitting(64, tokens * share)
    tiles = -(-positions // (warps * TERMS))
    if share & share - 1 or rows < max(share, ROWS) or dim & dim - 1 or not TERMS <= dim <= 256 or tiles < 4:
        return None
    parts, blocks = 2, tokens * heads // rows       # in one part it ran, but not in a graph (CUDA: invalid argument)
    while 2 * parts * blocks <= BLOCKS and 4 * parts <= tiles and parts < 16:   # a loop of one does not exist
        parts *= 2
    return FlashTiling(rows, warps, parts)


def words_of(pairs: list[tuple[UOp, UOp]], low: float, device: str) -> list[UOp]:
    """Pairs of numbers as words: first all with the high halves, then all with the low ones, `low` times as large."""
    halves = [[two_halves(x, low, device) for x in pair] for pair in pairs]
    bits = [[[half.bitcast(BITS).cast(WORD) for half in both] for both in pair] for pair in halves]
    return [first[part] | second[part] << 16 for part in range(2) for first, second in bits]


def put(buffer: UOp, cell: UOp, words: list[UOp]) -> list[UOp]:
    """Stores of a lane's words."""
    cell = cell.cast(dtypes.int).cast(dtypes.weakint)
    return [buffer.index(cell * WORDS + n).store(word) for n, word in enumerate(words)]


def cells(count: int, like: Tensor) -> Tensor:
    """A buffer for so many cells of all lanes."""
    return Tensor.empty(count * WARP * WORDS, dtype=WORD, device=like.device)


def lanes(count: int, first: int) -> tuple[UOp, UOp, UOp, UOp]:
    """Threads of a block of so many warps: the lane and the warp, loops with the numbers `first` and the next one; the
    lane's row of eight; its place among the four that share the row."""
    lane, warp = UOp.range(WARP, first, AxisType.LOCAL), const(0)
    if count > 1:
        warp = UOp.range(count, first + 1, AxisType.LOCAL)
    return lane, warp, lane // 4, lane & 3


def ended(name: str, stores: list[UOp], *loops: UOp) -> UOp:
    """A kernel that stores, in loops: those of a single turn are none."""
    return UOp.group(*stores).end(*(loop for loop in loops if loop.op is Ops.RANGE)).sink(
        arg=KernelInfo(name, opts_to_apply=()))


def queries(q: Tensor, kv_heads: int) -> Tensor:
    """q (tokens, heads, dim) as cells: (kv_heads, tiles of 16 rows, steps of 16 dimensions, high and low). Row r of
    heads that share keys is that of token r // share."""
    tokens, heads, dim = q.shape
    share, steps, device = heads // kv_heads, dim // TERMS, q.device
    tiles, warps = tokens * share // ROWS, fitting(8, dim // TERMS)

    def kernel(out: UOp, q: UOp) -> UOp:
        group, tile, some = UOp.range(kv_heads, 0), UOp.range(tiles, 1), UOp.range(steps // warps, 2)
        lane, warp, line, place = lanes(warps, 3)
        step, rows = some * warps + warp, [tile * ROWS + half * COLUMNS + line for half in range(2)]
        values = [[q.index(row // share, group * share + (row & (share - 1)), step * TERMS + place * 4 + n).load() * UP
                   for n in range(4)] for row in rows]
        words = words_of([(row[n], row[n + 1]) for n in (0, 2) for row in values], 1.0, device)
        cell = ((group * tiles + tile) * steps + step) * (2 * WARP) + lane
        stores = put(out, cell, words[:WORDS]) + put(out, cell + WARP, words[WORDS:])
        return ended(f"flash_queries_{tokens}_{heads}_{dim}", stores, group, tile, some, lane, warp)
    return cells(kv_heads * tiles * steps * 2, q).custom_kernel(q.contiguous(), fxn=kernel)[0]


def past(keys: Tensor, values: Tensor, position: Tensor, tokens: int, warps: int) -> list[Tensor]:
    """Keys and values of a text that ends `tokens` behind a position, as cells: (tiles of 16 positions, kv_heads,
    cells); 0 from its end to that of a tile of so many `warps`.

    A cell has 8 positions of keys and 16 dimensions, or 16 positions of values and 8 dimensions; high and low halves.
    """
    (positions, kv_heads, dim), device = keys.shape, keys.device
    count, tiles = dim // COLUMNS, -(-positions // (warps * TERMS)) * warps
    threads = fitting(8, count)

    def kernel(k: UOp, v: UOp, keys: UOp, values: UOp, position: UOp) -> UOp:
        tile, group = UOp.range(tiles, 0), UOp.range(kv_heads, 1)
        lane, warp, line, place = lanes(threads, 2)
        end = number(position.index(const(0)), positions) + tokens
        if tuning.is_cuda(device):
            leave = UOp(Ops.CUSTOM, dtypes.void, (tile // warps * (warps * TERMS) < end,), "if (!{0}) return;")
            keys, values = (buffer.after(UOp.barrier(leave)) for buffer in (keys, values))

        def value(buffer: UOp, at: UOp, dimension: UOp) -> UOp:
            return buffer.index(at.valid(at < end), group, dimension).load()
        stores = []
        for n in range(count // threads):
            cell = n * threads + warp
            at, first = tile * TERMS + (cell & 1) * COLUMNS + line, cell // 2 * TERMS + place * 4
            found = [value(keys, at, first + e) * UP for e in range(4)]
            to = ((tile * kv_heads + group) * count + cell) * WARP + lane
            stores += put(k, to, words_of([(found[0], found[1]), (found[2], found[3])], 1.0, device))
            found = [value(values, tile * TERMS + place * 2 + e, cell * COLUMNS + line) * DOWN for e in (0, 1, 8, 9)]
            stores += put(v, to, words_of([(found[0], found[1]), (found[2], found[3])], LOW, device))
        return ended(f"flash_past_{tokens}_{positions}_{kv_heads}_{dim}", stores, tile, group, lane, warp)
    made = [cells(tiles * kv_heads * count, keys) for _ in range(2)]
    return made[0].custom_kernel(made[1], keys, values, position, fxn=kernel)[:2]
