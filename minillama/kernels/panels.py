"""Products for prompts on a CPU: weights unpacked once into a panel, sums that stay in a core's registers.

A core does its arithmetic many times faster than it loads what to do it with, so each value that is loaded must serve
several sums. Some rows of weights are unpacked into a *panel* (columns, rows), which stays in the cache near the core
while all tokens pass by. These come in *blocks* of a few; the sums of a block, tokens × rows, are as many as a core's
registers hold. For each column the rows' weights are loaded once, for all tokens of the block, and a token's
value once, for all rows:

    for each column k:  for each row r:  sums[token][r] += panel[k][r] * x[token][k], for every token of the block

No vector is written down. The innermost loop is over rows, whose values lie side by side, with a statement for each
token: of that a compiler makes vectors of whatever length the CPU has, and keeps the sums in registers. (An x86 with
AVX-512: 180 GFLOP/s of one core, where tinygrad's own product reaches 32; chapter 13 measures both.)
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import count

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace, DType
from tinygrad.helpers import ceildiv
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT, apart, compiled
from minillama.kernels.block import const
from minillama.kernels.cores import between_cores, cores_for
from minillama.kernels.layouts import OCTET, Layout
from minillama.kernels.packed import Packed
from minillama.kernels.product import number, result

WASTE = 0.05        # of a loop's turns that may be done twice, to give more cores a share


def block_sums(device: str) -> tuple[int, int]:
    """Tokens × rows of a block, whose sums are to fit into registers: 32 of 64 or 32 bytes, which an x86 has with
    AVX-512 (its compiler is asked); 16 of 32 bytes, or 32 of 16. (Measured on an x86: 4 × 32 with AVX-512 240 GFLOP/s,
    with AVX2 50; 4 × 16 140 and 125. PoCL goes through rows eight at a time, and keeps no sums in registers where
    there are more.)"""
    if tuning.backend(device) == "CL":
        return 8, 8
    return 4, 32 if has_wide_vectors(device) else 16


@cache
def has_wide_vectors(device: str) -> bool:
    """Whether a CPU has AVX-512, says its compiler."""
    return b"wide" in compiled(device, "#ifdef __AVX512F__\nint wide;\n#endif\nint known;\n")


def below(wish: int, size: int) -> int:
    """The largest power of two up to both."""
    return 1 << min(wish, size).bit_length() - 1


@dataclass(frozen=True)
class Apart:
    """An array whose items are loaded one by one: of pairs and fours a compiler would make no longer vectors."""
    items: UOp

    def index(self, row: UOp, item: UOp) -> UOp:
        return self.items.index(row, apart(item))


class Panels:
    """A kernel that multiplies so many tokens, in blocks of `tokens`, with so many rows of weights, in panels of
    `rows`. It numbers its loops and arrays, and knows what loops are `around` a block."""

    def __init__(self, device: str, rows: int, tokens: int):
        self.tokens, self.rows = map(below, block_sums(device), (tokens, rows))
        self.device, self.numbers, self.around = device, count(), []

    def array(self, *shape: int, dtype: DType = FLOAT) -> UOp:
        """An array of the kernel's own."""
        return UOp.placeholder(shape, dtype, next(self.numbers), AddrSpace.REG)

    def loop(self, size: int) -> UOp:
        return UOp.range(size, next(self.numbers), AxisType.LOOP)

    def outer(self, size: int, shared: bool = False) -> UOp:
        """A loop around blocks; `shared`: whose turns are divided, with OpenCL among work groups, on a CPU among its
        cores (`cpu_graph`: of one such loop, the first)."""
        if size == 1:
            return const(0)
        kind = between_cores(self.device) if shared else AxisType.LOOP
        if kind is not AxisType.THREAD or any(loop.arg[-1] is kind for loop in self.around):
            self.around.append(UOp.range(size, next(self.numbers), AxisType.WEAK if shared else kind))
            return self.around[-1]
        cores = cores_for(size, WASTE)
        turns = ceildiv(size, cores)
        core, turn = (UOp.range(n, next(self.numbers), k) for n, k in ((cores, kind), (turns, AxisType.WEAK)))
        self.around += [core, turn]
        place = core * turns + turn
        return place if cores * turns == size else place.minimum(size - 1)

    def parts(self, size: int, each: int, shared: bool = False) -> UOp:
        """A loop over parts of `each` rows, or tokens, of so many: where a part starts. Where they do not divide
        evenly the last two overlap: what is done twice comes out the same."""
        start = self.outer(ceildiv(size, each), shared) * each
        return start if size % each == 0 else start.minimum(size - each)

    def turns(self, many: UOp, most: int) -> tuple[UOp, Callable[[UOp], UOp]]:
        """A loop that turns as often as the kernel finds out: once at least, `most` times at most. Its turn, and what
        ends it after some stores. (A range will not do: where its size depends on the place of a loop around it,
        tinygrad 0.14 would end both where the one ends.)"""
        loop, place = UOp.loop(next(self.numbers)), self.array(1, dtype=dtypes.int32)
        place = place.after(place.after(*self.around).index(const(0)).store(0), loop)
        turn, outside = number(place.index(const(0)), most), self.around
        self.around = [*outside, loop]

        def end(stores: UOp) -> UOp:
            self.around, following = outside, (turn + 1).cast(dtypes.int32)
            return place.after(stores).index(const(0)).store(following).end(loop, following < many.minimum(most))
        return turn, end

    def panel(self, layout: Layout, arrays: tuple[UOp, ...], first: UOp, columns: int) -> UOp:
        """Rows of a packed matrix from number `first` on, unpacked: (columns, rows)."""
        i, row, panel = self.loop(columns // OCTET), self.loop(self.rows), self.array(columns, self.rows)
        values = layout.octet(*(Apart(array) for array in arrays), first + row, i).values()
        stores = [panel.index(i * OCTET + k, row).store(value) for k, value in enumerate(values)]
        return panel.after(UOp.group(*stores).end(row).end(i))

    def block(self, panel: UOp, x: Callable[[int, UOp], UOp]) -> UOp:
        """The products of a panel's rows with the vectors of a block's tokens, x(token, column): (tokens, rows)."""
        column, row, start = self.loop(panel.shape[0]), self.loop(self.rows), self.loop(self.rows)
        sums, tokens = self.array(self.tokens, self.rows), range(self.tokens)
        zeros = [sums.after(*self.around).index(const(t), start).store(0.0) for t in tokens]
        before = sums.after(UOp.group(*zeros).end(start), column)
        weight = panel.index(column, row).load()
        stores = [before.index(const(t), row).store(before.index(const(t), row).load() + weight * x(t, column))
                  for t in tokens]
        return sums.after(UOp.group(*stores).end(row).end(column))

    def each(self, store: Callable[[int, UOp], UOp]) -> UOp:
        """What is stored of a block: store(token, row)."""
        row = self.loop(self.rows)
        return UOp.group(*(store(t, row) for t in range(self.tokens))).end(row)

    def kernel(self, name: str, stores: UOp) -> UOp:
        """The kernel, its loops written as they are."""
        return stores.end(*reversed(self.around)).sink(arg=KernelInfo(name, opts_to_apply=()))


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows). Twin:
    `product.linear_twin`."""
    (tokens, columns), extra = x.shape, [] if residual is None else [residual]

    def kernel(out: UOp, x: UOp, *buffers: UOp) -> UOp:
        make = Panels(weight.device, weight.rows, tokens)
        first = make.parts(weight.rows, make.rows, shared=True)
        panel = make.panel(weight.layout, buffers[len(extra):], first, columns)
        start = make.parts(tokens, make.tokens)
        sums = make.block(panel, lambda t, column: x.index(start + t, column).load())

        def store(t: int, row: UOp) -> UOp:
            place = start + t, first + row
            return out.index(*place).store(sum((one.index(*place).load() for one in buffers[:len(extra)]),
                                               sums.index(const(t), row).load()))
        return make.kernel(f"panels_{weight.format}_{tokens}_{weight.rows}_{columns}", make.each(store))
    return result(tokens, weight.rows, like=x).custom_kernel(x, *extra, *weight.arrays, fxn=kernel)[0]
