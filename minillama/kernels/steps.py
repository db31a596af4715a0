"""Kernels in steps: loops one after the other, over buffers in a core's nearest cache. For CPUs, which have no threads
that share memory, but caches that keep what the next loop needs.

Innermost loops run along neighbours that do not need each other, and are left as they are: compilers make vectors of
such loops by themselves, of exponentials, too, but do not find them again in what tinygrad unrolls (measured on an x86
with AVX-512: SiLU of 262,144 numbers took 85 µs as a loop, 830 with four of them a turn). Where a row is to be added
up, several sums stand side by side.
"""
from collections.abc import Callable

from tinygrad.dtype import AddrSpace, DType, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, UOp

from minillama.kernels.block import const
from minillama.kernels.cores import between_cores, cores_for
from minillama.kernels.product import number
from minillama.kernels.tuning import fitting

ROOM = 100          # number of the first buffer
BESIDE, AT_ONCE = 16, 4     # sums side by side that add up a row, and terms that each of them takes in a turn


def real(x: float) -> UOp:
    """A number to store."""
    return UOp.const(x, dtypes.float32)


class Steps:
    """The steps of a kernel, each of which waits for the one before; and its loops and buffers, numbered."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.done: tuple[UOp, ...] = ()
        self.around: list[UOp] = []
        self.loops = self.rooms = 0

    def loop(self, size: int, kind: AxisType = AxisType.REDUCE) -> UOp:
        """The counter of a loop; of nested loops the outer one comes first."""
        self.loops += 1
        return UOp.range(size, self.loops - 1, kind)

    def each(self, size: int, shared: bool = False) -> UOp:
        """The counter of a loop around all steps that follow, over parts of the result. One such loop can be `shared`
        by a CPU's cores (`cpu_graph`); with OpenCL, work groups share all of them."""
        kind = between_cores(self.device) if shared else AxisType.WEAK
        cores = cores_for(size) if kind is AxisType.THREAD else 1
        core, part = self.loop(cores, kind), self.loop(size // cores, AxisType.WEAK)
        self.around += [core, part]
        return core * (size // cores) + part

    def room(self, *shape: int, dtype: DType = dtypes.float32) -> UOp:
        """A buffer for each of those parts."""
        self.rooms += 1
        return UOp.placeholder(shape, dtype, ROOM + self.rooms, AddrSpace.REG).after(*self.around)

    def now(self, buffer: UOp, *loops: UOp) -> UOp:
        """A buffer as the steps so far have left it, and the turns so far of the loops that it is now in."""
        return buffer.after(*self.done, *loops)

    def do(self, loops: tuple[UOp, ...], *stores: UOp) -> None:
        """A step: stores in nested loops, the outer one first."""
        self.done = (UOp.group(*stores),)
        self.end(*loops)

    def end(self, *loops: UOp) -> None:
        """The steps since these loops began are in them."""
        for loop in reversed(loops):
            self.done = (self.done[0].end(loop),)

    def kernel(self, name: str) -> UOp:
        """All of them."""
        self.end(*self.around)
        return self.done[0].sink(arg=KernelInfo(name, opts_to_apply=()))

    def sum(self, size: int, term: Callable[[UOp], UOp]) -> UOp:
        """The sum of so many terms, by number. (One sum would be a chain of additions, and none of it a vector.)"""
        beside = fitting(BESIDE, size)
        turns = fitting(AT_ONCE, size // beside)
        sums, place = self.room(beside), self.loop(beside)
        self.do((place,), self.now(sums).index(place).store(real(0)))
        turn, place = loops = self.loop(size // beside // turns), self.loop(beside)
        cell = self.now(sums, turn).index(place)
        self.do(loops, cell.store(cell.load() + sum(term((turn * turns + n) * beside + place) for n in range(turns))))
        parts = [self.now(sums).index(const(n)).load() for n in range(beside)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def repeat(self, most: int) -> tuple[UOp, UOp]:
        """A loop whose end is said last, and the number of its turn, below `most`. (tinygrad 0.14 cannot render a
        range whose size depends on another one.)"""
        self.loops += 1
        loop, turns = UOp.loop(self.loops - 1), self.room(1, dtype=dtypes.int32)
        self.do((), self.now(turns).index(const(0)).store(UOp.const(0, dtypes.int32)))
        self.turns, self.most = self.now(turns, loop), most
        return loop, number(self.turns.index(const(0)), most)

    def until(self, loop: UOp, turn: UOp, count: UOp) -> None:
        """The steps so far are in that loop, which has `count` turns: one at least, and `most` at most."""
        self.do((), self.turns.after(*self.done).index(const(0)).store((turn + 1).cast(dtypes.int32)))
        self.done = (self.done[0].end(loop, turn + 1 < count.minimum(self.most)),)
