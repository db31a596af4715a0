"""Products for a prompt (GEMM) on tensor cores, with packed weights, in tiles that go through shared memory.

A block of threads multiplies a tile of rows of weights with a tile of tokens, some columns at a time (a *stage*),
while the next stage is on its way (`staging.py`). The weights travel packed: threads read the file's words from shared
memory, and under a mask a word is a pair of halves, as in `mma.py`. x comes as two halves (`halves.py`).

One instruction adds up 16 columns. Of a span of 32, each of the four lanes of a row has an octet, and two instructions
take its quants in the order in which they lie; x is put into the same order beforehand. (Where a span has two scales,
or weights go in as two halves, there are more.)
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from tinygrad import Tensor
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import gemm_tuning, tuning
from minillama.kernels.bits import FLOAT, HALF, WORD, as_halves, two_halves
from minillama.kernels.block import const
from minillama.kernels.gemm_tuning import GemmTiling
from minillama.kernels.halves import HALVES, PLAIN, QUANT, SPAN, STAGE, SUMMED, Halves
from minillama.kernels.layouts import OCTET, Layout, Octet
from minillama.kernels.mma import COLUMNS, LOW, ROWS, TERMS, WARP
from minillama.kernels.packed import Packed
from minillama.kernels.product import result
from minillama.kernels.staging import Factor, Stages, neighbours, staged, stride

SUMS_OF = STAGE // SUMMED   # of a token and stage
CELLS, SUMS, PACKED, TOTALS = 20, 21, 30, 1001      # numbers of buffers
Octets = Callable[[UOp], list[Octet]]   # (number in the span) -> those of two rows
Tile = tuple[list[UOp], list[UOp]]      # a thread's octet of one token's x: the high halves, the low ones
Terms = list[list[UOp]]                 # of four products, two rows times two tokens: what each adds up
ZEROS = UOp.stack(*[UOp.const(0.0, FLOAT)] * 4)


# ---- one span -----------------------------------------------------------------------------------------------------


def quants_times(layout: Layout, octets: Octets, share: UOp, tiles: list[Tile], of_x: list, device: str,
                 ) -> list[Terms]:
    """A span of two rows of quants, of which this thread has an octet each (number `share`), times each tile of
    tokens. `of_x`: sums of x, by tile and token. Where a span has two scales, quants under the other are masked."""
    own, groups = [octet.pairs() for octet in octets(share)], SPAN // layout.span
    found: list[Terms] = [[[] for _ in range(4)] for _ in tiles]
    for group in range(groups):
        words = [[own[row][k + more].word for more in range(2) for row in range(2)] for k in (0, 2)]
        if groups > 1:
            mask = (share // groups).eq(group).where(*(UOp.const(n, WORD) for n in (0xffffffff, 0)))
            words = [[word & mask for word in some] for some in words]
        rows = [UOp.stack(*as_halves(some, device)) for some in words]
        scales = octets(share if groups == 1 else const(groups * group))
        for (high, low), parts, terms in zip(tiles, of_x, found, strict=True):
            sums = [sum(part) if groups == 1 else part[group] for part in parts]
            # the bias goes in first: sum (q - bias) * x = sum q * x - bias * sum x
            first = [x * float(-scales[0].bias * LOW) if scales[0].bias else UOp.const(0.0, FLOAT) for x in sums]
            total = scaled_down(accumulated(rows, low, UOp.stack(*first, *first)))
            total = accumulated(rows, high, total)
            for e in range(4):
                octet = scales[e // 2]
                terms[e].append(total.index(const(e)) * octet.scale)
                if octet.offset is not None:
                    terms[e].append(sums[e % 2] * octet.offset)
    return found


def values_times(octets: list[Octet], exact: bool, tiles: list[Tile], device: str) -> list[Terms]:
    """The same of two rows of plain values. They go in as two halves, too, unless one holds them: `exact`."""
    parts = [[two_halves(value, LOW, device) for value in octet.plain] for octet in octets]
    high, low = ([UOp.stack(*(parts[row][k + half + n][part] for half in (0, 2) for row in range(2) for n in range(2)))
                  for k in (0, 4)] for part in range(2))
    found = []
    for x, rest in tiles:
        total = accumulated(high, rest, ZEROS)
        total = accumulated(high, x, scaled_down(total if exact else accumulated(low, x, total)))
        found.append([[total.index(const(e))] for e in range(4)])
    return found


def scaled_down(total: UOp) -> UOp:
    """What low halves have added up to, among the sums of high ones."""
    return UOp.stack(*(total.index(const(e)) * (1 / LOW) for e in range(4)))


def accumulated(rows: list[UOp], x: list[UOp], total: UOp) -> UOp:
    """A total and a span's products."""
    for k, halves in enumerate(rows):
        total = UOp.wmma(halves, UOp.stack(*x[4 * k:4 * k + 4]), total, (COLUMNS, ROWS, TERMS), "CUDA", WARP)
    return total


# ---- a block of threads -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A block of threads, and its tile: the rows and tokens of `cut`."""
    cut: GemmTiling
    device: str

    @cached_property
    def threads(self) -> tuple[UOp, UOp, UOp]:
        """A thread's number in its warp; the warp's along rows, and along tokens."""
        sizes = WARP, self.cut.down, self.cut.across
        return tuple(UOp.range(size, 2 + n, AxisType.LOCAL) if size > 1 else const(0) for n, size in enumerate(sizes))

    @property
    def ranges(self) -> tuple[UOp, ...]:
        """The loops over threads, to be ended by the kernel."""
        return tuple(one for one in self.threads if one.op is Ops.RANGE)

    @property
    def share(self) -> UOp:
        """The thread's number among the four that share a row."""
        return self.threads[0] & 3

    @property
    def line(self) -> UOp:
        """Its row among the first eight of a tile of 16."""
        return self.threads[0] // 4

    def row(self, r: int, half: int) -> UOp:
        """The block's row that is row `half` of two of this thread in its tile `r`."""
        return (self.threads[1] * self.cut.each + r) * ROWS + half * (ROWS // 2) + self.line

    def token(self, k: int, column: UOp) -> UOp:
        """The block's token in a column of this warp's tile `k`."""
        return (self.threads[2] * self.cut.columns + k) * COLUMNS + column

    def places(self) -> tuple[list[UOp], list[UOp]]:
        """The rows and the tokens, in the block, of this thread's sums with one factor, in their order."""
        every = [(self.row(r, e // 2), self.token(k, self.share * 2 + e % 2))
                 for r in range(self.cut.each) for k in range(self.cut.columns) for e in range(4)]
        return tuple(map(list, zip(*every, strict=True)))

    def shares(self, rows: int, items: int = 1) -> list[tuple[UOp, UOp]]:
        """Of so many rows and items of each, this thread's, so that all threads together have every one (some, maybe,
        twice)."""
        (lane, down, across), threads = self.threads, self.cut.warps * WARP
        at, turns = (down * self.cut.across + across) * WARP + lane, max(1, rows * items // threads)
        if rows * items < threads:
            at = at & (rows * items - 1)
        return [(at // items + n * (threads // items), at & (items - 1)) for n in range(turns)]

    def sums(self, factors: list[Factor], parts: UOp, of_x: UOp, token: Callable[[UOp], UOp], loops: UOp, most: int,
             ) -> list[UOp]:
        """The sums of all rows of each factor with all tokens, of which this thread has some: see `places`. `token`:
        which row of x is the block's token with that number; `loops`, at most `most`: how many stages there are."""
        c = self.cut
        stages = Stages(c.stages, loops, most, self.device)
        cells = stages.room(c.tokens * HALVES, HALF, CELLS)
        sums = stages.room(c.tokens * SUMS_OF, FLOAT, SUMS)
        for local, chunk in self.shares(c.tokens, HALVES // OCTET):
            stages.take(cells, local * HALVES + swapped(local, chunk) * OCTET, parts, token(local), HALVES,
                        chunk * OCTET, OCTET)
        for local, _ in self.shares(c.tokens):
            stages.take(sums, local * SUMS_OF, of_x, token(local), SUMS_OF, const(0), SUMS_OF)
        windows = [stages.windows(factor, c.rows, self.shares, PACKED + 8 * n) for n, factor in enumerate(factors)]
        stage = stages.run()
        found = [[] for _ in range(len(factors) * c.each * c.columns * 4)]
        for span in range(STAGE // SPAN):
            tiles, sums_of = self._x(stages.at(cells), stages.at(sums), span)
            for n, (factor, arrays) in enumerate(zip(factors, windows, strict=True)):
                first = stages.first(factor.layout) + span * (SPAN // OCTET)
                for r in range(c.each):
                    for k, terms in enumerate(self._span(factor.layout, arrays, r, first, tiles, sums_of)):
                        for e, some in enumerate(terms):
                            found[((n * c.each + r) * c.columns + k) * 4 + e] += some
        totals = UOp.placeholder((len(found),), FLOAT, TOTALS, AddrSpace.REG)
        old = totals.after(*(totals.index(const(k)).store(UOp.const(0.0)) for k in range(len(found)))).after(stage)
        stores = [totals.index(const(k)).store(sum(ys, old.index(const(k)).load())) for k, ys in enumerate(found)]
        totals, unit = totals.after(UOp.group(*stores).end(stage)), QUANT if factors[0].layout.block > 1 else PLAIN
        return [totals.index(const(k)).load() * unit for k in range(len(found))]

    def _x(self, cells: tuple[UOp, UOp], sums: tuple[UOp, UOp], span: int) -> tuple[list[Tile], list]:
        """For each tile of 8 tokens the high and the low halves of this thread's octet, and the span's sums of x for
        its two tokens. cells, sums: the buffer, and what it holds before this stage."""
        found, of_x = [], []
        for k in range(self.cut.columns):
            local = self.token(k, self.line)
            found.append(tuple(neighbours(cells[0], cells[1] // OCTET + local * (HALVES // OCTET) + swapped(
                self.line, span * 8 + low * 4 + self.share, low), OCTET) for low in range(2)))
            of_x.append([neighbours(sums[0], sums[1] // 2 + self.token(k, self.share * 2 + n) * 2 + span, 2)
                         for n in range(2)])
        return found, of_x

    def _span(self, layout: Layout, arrays: tuple, r: int, first: UOp, tiles: list[Tile], of_x: list) -> list[Terms]:
        """This thread's products of its tile `r` of rows in a span, whose first octet is `first`."""
        def octets(n: UOp) -> list[Octet]:
            return [layout.octet(*arrays, self.row(r, half), first + n) for half in range(2)]
        if layout.block == 1:
            return values_times(octets(self.share), layout.name == "F16", tiles, self.device)
        return quants_times(layout, octets, self.share, tiles, of_x, self.device)


def swapped(token: UOp, chunk: UOp, low: int | None = None) -> UOp:
    """Where a chunk of 8 halves lies in shared memory: of every other token, high and low ones have changed places, so
    that threads that read at once use different banks."""
    low = chunk // 4 & 1 if low is None else low
    return chunk + (token & 1) * (4 - low * 8)


def tiling(tokens: int, rows: int, *weights: Packed, besides: int = 0) -> GemmTiling:
    """The fastest tiling for so many tokens, and rows of each of these matrices, that shared memory has room for.
    `besides`: further numbers that a block keeps there, for each row and four more."""
    for cut in gemm_tuning.tilings(tokens, rows, len(weights)):
        items = sum(stride(part) * part.dtype.itemsize for weight in weights for part in weight.layout.parts
                    if staged(part))
        room = cut.stages * (cut.tokens * (HALVES * 2 + SUMS_OF * 4) + cut.rows * items)
        if room + besides * (cut.rows + 4) * 4 <= tuning.SHARED:
            return cut
    raise ValueError(f"no tiling of {rows} rows and {tokens} tokens fits into shared memory")


def linear(x: Halves, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows)."""
    tokens, rows, extra = x.parts.shape[0], weight.rows, [] if residual is None else [residual]
    cut, stages = tiling(tokens, rows, weight), weight.columns // STAGE
    block = Block(cut, x.parts.device)

    def kernel(out: UOp, *buffers: UOp) -> UOp:
        parts, sums, *arrays = buffers[len(extra):]
        first, group = UOp.range(-(-rows // cut.rows), 0), UOp.range(tokens // cut.tokens, 1)

        def row(local: UOp) -> UOp:     # the last block may do some rows twice
            return first * cut.rows + local if rows % cut.rows == 0 else (first * cut.rows + local).minimum(rows - 1)

        def token(local: UOp) -> UOp:
            return group * cut.tokens + local
        found = block.sums([Factor(weight.layout, tuple(arrays), row)], parts, sums, token, const(stages), stages)
        stores = []
        for local, column, y in zip(*block.places(), found, strict=True):
            at = token(column), row(local)
            stores.append(out.index(*at).store(y + buffers[0].index(*at).load() if extra else y))
        return UOp.group(*stores).end(first, group, *block.ranges).sink(
            arg=KernelInfo(f"gemm_{weight.format}_{tokens}_{rows}_{weight.columns}", opts_to_apply=()))
    return result(tokens, rows, like=x.parts).custom_kernel(*extra, x.parts, x.sums, *weight.arrays, fxn=kernel)[0]
