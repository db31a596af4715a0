"""Products for prompts on a CPU: weights unpacked once into a panel, sums that stay in a core's registers.

A core does its arithmetic many times faster than it loads what to do it with, so each value that is loaded must serve
several sums. Some rows of weights are unpacked into a *panel* (columns, rows), which stays in the cache near the core
while all tokens pass by. These come in *blocks* of a few; the sums of a block, tokens × rows, are as many as a core's
registers hold. For each column the rows' weights are loaded once, for all tokens of the block, and a token's
value once, for all rows:

    for each column k:  for each row r:  sums[token][r] += panel[k][r] * x[token][k], for every token of the block

No vector is written down. The innermost loop is over rows, whose values lie side by side, with a statement for each
token: of that a compiler makes vectors of whatever length the CPU has, and keeps the sums in registers. (An x86 with
AVX-512: 200 GFLOP/s of one core, where a product as tinygrad tiles it reached 10.)
"""
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import count

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT, apart, compiled
from minillama.kernels.block import const
from minillama.kernels.layouts import OCTET, Layout
from minillama.kernels.packed import Packed
from minillama.kernels.product import number, result


@cache
def block_sums(device: str) -> tuple[int, int]:
    """Tokens × rows of a block. 32 registers of 64 bytes, which an x86 has with AVX-512 (its compiler is asked), hold
    the sums of eight tokens; 16 of 32 bytes, or 32 of 16, those of four. (Measured on an x86: eight tokens 200 GFLOP/s
    with AVX-512, 49 with AVX2; four 120 and 125. PoCL goes through rows eight at a time, and keeps no sums in
    registers where there are more.)"""
    if tuning.backend(device) == "CL":
        return 8, 8
    return 8 if b"wide" in compiled(device, "#ifdef __AVX512F__\nint wide;\n#endif\nint known;\n") else 4, 16


@dataclass(frozen=True)
class Apart:
    """An array whose items are loaded one by one: given pairs and fours, a compiler makes no longer vectors of them."""
    items: UOp

    def index(self, row: UOp, item: UOp) -> UOp:
        return self.items.index(row, apart(item))


class Panels:
    """What a kernel needs to multiply blocks of `tokens` tokens with panels of `rows` rows of weights; it numbers its
    loops and the arrays that it keeps for itself."""

    def __init__(self, device: str, rows: int, tokens: int):
        self.tokens, self.rows = map(tuning.fitting, block_sums(device), (tokens, rows))
        self.numbers: Iterator[int] = count()

    def loop(self, size: int | UOp, shared: bool = False) -> UOp:
        """A loop; `shared`: one whose turns may be divided among threads."""
        return UOp.range(size, next(self.numbers), AxisType.WEAK if shared else AxisType.LOOP)

    def array(self, *shape: int) -> UOp:
        """An array of floats of the kernel's own."""
        return UOp.placeholder(shape, FLOAT, next(self.numbers), AddrSpace.REG)

    def panel(self, layout: Layout, arrays: tuple[UOp, ...], first: UOp, columns: int) -> UOp:
        """Rows of a packed matrix from number `first` on, unpacked: (columns, rows)."""
        i, row, panel = self.loop(columns // OCTET), self.loop(self.rows), self.array(columns, self.rows)
        values = layout.octet(*(Apart(array) for array in arrays), first + row, i).values()
        stores = [panel.index(i * OCTET + k, row).store(value) for k, value in enumerate(values)]
        return panel.after(UOp.group(*stores).end(row).end(i))

    def block(self, panel: UOp, x: Callable[[int, UOp], UOp], turn: UOp) -> UOp:
        """The products of a panel's rows with the vectors of a block's tokens, x(token, column), in each `turn` of a
        loop over blocks: (tokens, rows)."""
        column, row, start = self.loop(panel.shape[0]), self.loop(self.rows), self.loop(self.rows)
        empty, tokens = self.array(self.tokens, self.rows), range(self.tokens)
        zeros = [empty.after(turn).index(const(t), start).store(0.0) for t in tokens]
        sums = empty.after(UOp.group(*zeros).end(start), column)
        weight = panel.index(column, row).load()
        stores = [sums.index(const(t), row).store(sums.index(const(t), row).load() + weight * x(t, column))
                  for t in tokens]
        return empty.after(UOp.group(*stores).end(row).end(column))

    def turns(self, many: UOp, most: int, within: UOp) -> tuple[UOp, Callable[[UOp], UOp]]:
        """A loop that turns as often as a kernel finds out `within` another one: once at least, below `most` times.
        Its turn, and what ends it after some stores. (A range whose size depends on another's place will not do:
        tinygrad 0.14 would end both where the one ends.)"""
        loop, number_of = UOp.loop(next(self.numbers)), next(self.numbers)
        place = UOp.placeholder((1,), dtypes.int32, number_of, AddrSpace.REG)
        place = place.after(place.after(within).index(const(0)).store(0), loop)
        turn = number(place.index(const(0)), most)

        def end(stores: UOp) -> UOp:
            following = (turn + 1).cast(dtypes.int32)
            return place.after(stores).index(const(0)).store(following).end(loop, following < many)
        return turn, end

    def each(self, store: Callable[[int, UOp], UOp]) -> UOp:
        """What is stored of a block: store(token, row)."""
        row = self.loop(self.rows)
        return UOp.group(*(store(t, row) for t in range(self.tokens))).end(row)


def kernel(name: str, stores: UOp, *loops: UOp) -> UOp:
    """A kernel of these loops, written as they are."""
    return stores.end(*loops).sink(arg=KernelInfo(name, opts_to_apply=()))


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows). Twin:
    `product.linear_twin`."""
    (tokens, columns), extra = x.shape, [] if residual is None else [residual]

    def work(out: UOp, x: UOp, *buffers: UOp) -> UOp:
        make = Panels(weight.device, weight.rows, tokens)
        group = make.loop(weight.rows // make.rows, shared=True)
        panel = make.panel(weight.layout, buffers[len(extra):], group * make.rows, columns)
        turn = make.loop(tokens // make.tokens)
        sums = make.block(panel, lambda t, column: x.index(turn * make.tokens + t, column).load(), turn)

        def store(t: int, row: UOp) -> UOp:
            place = turn * make.tokens + t, group * make.rows + row
            return out.index(*place).store(sum((one.index(*place).load() for one in buffers[:len(extra)]),
                                               sums.index(const(t), row).load()))
        return kernel(f"panels_{weight.format}_{tokens}_{weight.rows}_{columns}", make.each(store), turn, group)
    return result(tokens, weight.rows, like=x).custom_kernel(x, *extra, *weight.arrays, fxn=work)[0]
