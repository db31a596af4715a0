"""Products for a few tokens (GEMV) on tensor cores: one instruction multiplies a tile of 16 rows of weights, 16
columns each, with 8 columns of x, all halves (PTX: `mma.sync.m16n8k16`).

One token needs one of those 8 columns. The spare ones do two jobs. A column holds x as precisely as a half can, its
neighbour the rest (x = high + low / LOW: 22 bits, or down to 2^-27 where x is small). And of the four lanes that share
a tile's rows, each holds another block of weights, with its own scale: each block has its own pair of columns, in
which the other lanes' terms are zero. So a tile never adds up two blocks that have different scales.

Quants go in without conversion: under a mask, a word is a pair of subnormal halves, which tensor cores multiply
exactly. Eight quants of four bits take five instructions; with everything around it, a product of 12352 rows takes 1.7
instructions a weight, in floats 3.3 (Q4_0, one token; ptxas 13.0 for sm_90).
"""
from dataclasses import dataclass, replace

from tinygrad import dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import AxisType, Ops, UOp

from minillama.kernels.bits import FLOAT, HALF, as_halves, two_halves
from minillama.kernels.block import const, shared_memory
from minillama.kernels.layouts import OCTET, Layout, Octet, Pair
from minillama.kernels.sums import Factor, Prefetch, Summed, Vectors, lane_sums, nothing
from minillama.kernels.tuning import WarpTiling

WARP, ROWS, COLUMNS, TERMS = 32, 16, 8, 16      # threads; of an instruction: rows, columns, terms that it adds up
BLOCK = 32                                      # values of a row that a lane does at once: four octets
OCTETS = BLOCK // OCTET
STEP = 4 * BLOCK                                # and the four lanes of a row
LOW = 2048.0        # scales the low part up to where halves are precise
DOWN = 4            # x goes in 2^-4 times as large: halves end at 65,504, and so x at a million
SUBNORMAL = 24      # the half whose bits are those of the integer 1 is 2^-24
CELLS, OF_X, OF_SQUARES, SQUARES = 5, 6, 7, 8   # numbers of shared buffers
INT = dtypes.int
CELL, ZEROS = 8, 8                              # halves that are read at once; cells that hold zeros


def order(layout: Layout) -> list[Pair] | None:
    """The pairs in which an octet's quants come; None where a format is not packed so that tensor cores could use
    it."""
    if layout.block == 1 or layout.span == 0:
        return None
    arrays = (UOp.placeholder((1, STEP), part.dtype, n) for n, part in enumerate(layout.parts))
    return layout.octet(*arrays, const(0), const(0)).pairs()


def fits(*layouts: Layout) -> bool:
    """Whether matrices so packed can be multiplied with the same x at once."""
    orders = [order(layout) for layout in layouts]
    return None not in orders and len({tuple((p.first, p.second, p.power) for p in pairs) for pairs in orders}) == 1


@dataclass(frozen=True)
class SharedTile:
    """The vectors in shared memory, laid out for tensor cores: for each warp and each `tile` (one step of one vector)
    32 cells of 8 halves. A cell holds an octet's high or low halves, in the order of its pairs. Cells are permuted so
    that lanes that write or read at the same time use different banks."""
    lane: UOp
    warp: UOp
    warps: int
    tiles: int          # a warp
    cells: UOp
    of_x: UOp           # sums of x: (all tiles, blocks of a step, octets)
    of_squares: UOp     # and of squares

    @classmethod
    def empty(cls, lane: UOp, warp: UOp, warps: int, tiles: int) -> "SharedTile":
        cells = warps * tiles * WARP + ZEROS
        buffers = UOp.placeholder((cells * CELL,), HALF, CELLS, AddrSpace.LOCAL), *(
            shared_memory(n, warps * tiles, 4, OCTETS) for n in (OF_X, OF_SQUARES))
        return cls(lane, warp, warps, tiles, *buffers)

    def places(self, cell: UOp) -> list[UOp]:
        """A cell's eight halves. (Its number is an int32, so that tinygrad sees them as neighbours.)"""
        return [self.cells.index(cell.cast(dtypes.weakint) * CELL + n) for n in range(CELL)]

    def filled(self, *stores: UOp) -> "SharedTile":
        """The same, once all threads have stored."""
        ready = UOp.barrier(*stores)
        return replace(self, cells=self.cells.after(ready), of_x=self.of_x.after(ready),
                       of_squares=self.of_squares.after(ready))

    def zeros(self) -> list[UOp]:
        cell = self.warps * self.tiles * WARP + (self.lane & (ZEROS - 1)).cast(INT)
        return [place.store(UOp.const(0.0, HALF)) for place in self.places(cell)]

    def write(self, pairs: list[Pair], tile: UOp, x: list[UOp], plain: list[UOp] | None, device: str) -> list[UOp]:
        """Stores this lane's octet of x, one of a tile's 16; `plain`: the values whose squares are added up."""
        octet, block, number = self.lane & 3, (self.lane // 4) & 3, self.warp * self.tiles + tile
        halves = [two_halves(x[place] * 2.0 ** -(pair.power + DOWN), LOW, device)
                  for pair in pairs for place in (pair.first, pair.second)]
        first = (number * WARP).cast(INT)
        stores = [self.of_x.index(number, block, octet).store(sum(x[1:], x[0]))]
        for low in range(2):
            cell = first + cell_of(octet.cast(INT), block.cast(INT), low)
            stores += [place.store(half[low]) for place, half in zip(self.places(cell), halves, strict=True)]
        if plain:
            stores.append(self.of_squares.index(number, block, octet).store(sum(v.square() for v in plain)))
        return stores

    def read(self, tile: int) -> list[list[UOp]]:
        """The column lane // 4 (of a block: high or low), for the terms of this lane: its octets' halves, or zeros
        where the block is not its own."""
        row, share = (self.lane // 4).cast(INT), (self.lane & 3).cast(INT)
        block, zero, found = row // 2, self.warps * self.tiles * WARP, []
        mine = block.eq(share).cast(INT)
        first = (self.warp * (self.tiles * WARP)).cast(INT)
        for octet in range(OCTETS):
            start = zero + (cell_of(octet, block, row & 1, of_step=False) ^ (2 - 2 * mine))  # zeros: other banks
            place = start + mine * (first + (octet * CELL - zero)) + mine * WARP * tile
            found.append([one.load() for one in self.places(place)])
        return found

    def sums(self, cells: UOp, tile: int) -> list[UOp]:
        """Sums of x, or of squares, over each octet of this lane's block."""
        return [cells.index(self.warp * self.tiles + tile, self.lane & 3, const(n)).load() for n in range(OCTETS)]


def cell_of(octet: UOp | int, block: UOp, low: UOp | int, of_step: bool = True) -> UOp:
    """Which of a tile's cells holds an octet of a block, its high halves or (low = 1) its low ones: counted among all
    32, or among the eight of octets with that number."""
    cell = ((block + octet) & 3) * 2 + (low ^ (block & 1))
    return octet * CELL + cell if of_step else cell


def product(layout: Layout, rows: list[list[Octet]], columns: list[list[UOp]], sums: list[UOp], device: str,
            ) -> list[UOp]:
    """A lane's share of the products of two rows: rows (2, octets of a block), columns and sums from `SharedTile`.

    One instruction adds up half an octet of each of four lanes; octets that share a scale go into the same sum.
    """
    found, size = [[], []], layout.span // OCTET
    pairs = [[octet.pairs() for octet in row] for row in rows]
    for first in range(0, OCTETS, size):
        total = UOp.stack(*[UOp.const(0.0, FLOAT)] * 4)
        for n in range(first, first + size):
            for k in (0, 2):
                words = [pairs[row][n][k + more].word for more in range(2) for row in range(2)]
                halves = UOp.stack(*as_halves(words, device))
                total = UOp.wmma(halves, UOp.stack(*columns[n][2 * k:2 * k + 4]), total, (COLUMNS, ROWS, TERMS),
                                 "CUDA", WARP)
        x = sum(sums[first + 1:first + size], sums[first])
        for row in range(2):
            high, low = (total.index(const(2 * row + n)) for n in range(2))
            y = (high + low * (1 / LOW)) * 2.0 ** (SUBNORMAL + DOWN)
            found[row].append(rows[row][first].scaled(y, x, rows[row][first].bias))
    return [sum(ys[1:], ys[0]) for ys in found]


@dataclass(frozen=True)
class MmaRows:
    """Sums along `rows` rows of `columns` columns, for each of `tokens` tokens, tiled as `tuning.mma_tiling` says: the
    warps of a block share `each` times 16 rows, and each takes some steps of their columns, and some terms."""
    device: str
    rows: int
    columns: int
    tokens: int
    cut: WarpTiling

    def sums(self, *factors: Factor, outer: int = 1, once: Factor | None = None, prefetch: Prefetch = nothing,
             ) -> Summed:
        """As `sums.Rows.sums`; the factors have the same x."""
        c, x, groups = self.cut, factors[0].x, -(-self.tokens // self.cut.tokens)
        block, lane = UOp.range(self.rows // (c.each * ROWS), 0), UOp.range(WARP, 1, AxisType.LOCAL)
        warp = UOp.range(c.every, 2, AxisType.LOCAL)
        along, before = warp & (c.warps - 1), warp // c.warps * (outer // c.groups)     # its columns, and first term
        group = UOp.range(groups, 3) if groups > 1 else const(0)

        def token(n: UOp | int) -> UOp:     # the last group may do some tokens twice
            return (group * c.tokens + n).minimum(self.tokens - 1) if groups > 1 else group + n
        mine = outer // c.groups
        terms = mine + (once is not None)
        shared = SharedTile.empty(lane, warp, c.every, terms * c.tokens * c.steps)
        stores = shared.zeros()
        for n in range(c.tokens):
            stores += self._write(shared, factors[0].x, order(factors[0].layout), token(n), n * terms, before, mine)
            if once:        # by the first group; the others multiply it with zeros
                first = Vectors(lambda *at: before.eq(0).where(once.x.value(*at), 0.0)) if c.groups > 1 else once.x
                stores += self._write(shared, first, order(once.layout), token(n), n * terms + mine, const(0), 1)
        share, row = lane & 3, lane // 4                                # of a tile
        own, at, lanes = c.each * 2 * c.tokens, warp * 4 + share, 4 * c.every       # lanes with the same rows
        last = at.minimum(own - 1)                                      # the sum that this lane finishes
        half = last // c.tokens
        place = token(last - half * c.tokens), block * (c.each * ROWS) + half * 8 + row
        soon = prefetch(*place)
        shared = shared.filled(*stores, *soon)
        found = [[] for _ in range(len(factors) * c.each * 2 * c.tokens)]
        squares = [[] for _ in range(c.tokens if x.plain else 0)]
        for n, step, term in ((n, s, t) for n in range(c.tokens) for s in range(c.steps) for t in range(terms)):
            tile = (n * terms + term) * c.steps + step
            columns, of_x = shared.read(tile), shared.sums(shared.of_x, tile)
            if x.plain and term == 0:
                squares[n] += shared.sums(shared.of_squares, tile)
            first = (along * c.steps + step) * (STEP // OCTET) + share * OCTETS
            for i, factor in enumerate(factors if term < mine else [once]):
                for r in range(c.each):
                    rows = [factor.row((block * c.each + r) * ROWS + half * 8 + row, before + term)
                            for half in range(2)]
                    octets = [[factor.layout.octet(*factor.arrays, one, first + o) for o in range(OCTETS)]
                              for one in rows]
                    for half, y in enumerate(product(factor.layout, octets, columns, of_x, self.device)):
                        found[((i * c.each + r) * 2 + half) * c.tokens + n].append(y)
        cells = shared_memory(SQUARES, c.tokens, lanes)
        sums, ready = lane_sums([sum(ys[1:], ys[0]) for ys in found], at, lanes, row, WARP // 4, tuple(
            cells.index(const(n), at).store(sum(xs)) for n, xs in enumerate(squares)))
        totals = [sums(last + i * own) for i in range(len(factors))]
        if x.plain:
            n, cells = last - half * c.tokens, cells.after(ready)
            squares = sum(cells.index(n, const(other)).load() for other in range(lanes))
            scale = x.scale(squares, self.columns)
            totals = [y * scale for y in totals]
        # a lane without a sum of its own writes the last one's result again: tinygrad 0.14 loses some conditions
        return Summed(totals, place[1], place[0], place[1],
                      tuple(r for r in (block, lane, warp, group) if r.op is Ops.RANGE), (), soon)

    def _write(self, shared: SharedTile, x: Vectors, pairs: list[Pair], token: UOp, vector: int, before: UOp,
               terms: int) -> list[UOp]:
        """The stores of a token's vectors, one for each term from `before` on; a warp does two tiles at once."""
        c, stores, second, along = self.cut, [], shared.lane // 16, shared.warp & (self.cut.warps - 1)
        for n in range(0, terms * c.steps, 2):
            tile = (n + second).minimum(terms * c.steps - 1)
            term, step = (const(n // c.steps), n % c.steps + second) if c.steps > 1 else (tile, const(0))
            octet = (along * c.steps + step) * (STEP // OCTET) + (shared.lane & 15)
            values = [x.value(token, before + term, octet, k) for k in range(OCTET)]
            plain = [x.plain(token, before + term, octet, k) for k in range(OCTET)] if x.plain else None
            stores += shared.write(pairs, vector * c.steps + tile, values, plain, self.device)
        return stores
