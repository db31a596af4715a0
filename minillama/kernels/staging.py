"""Copies into shared memory for which no thread stops (PTX: `cp.async`): what a block of threads needs for its next
*stage* is on its way while it works on this one. So threads keep nothing of it in registers, and hardly wait for it.
"""
from collections.abc import Callable
from dataclasses import dataclass, field

from tinygrad import dtypes
from tinygrad.dtype import AddrSpace, DType
from tinygrad.uop.ops import AxisType, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.block import const
from minillama.kernels.halves import STAGE
from minillama.kernels.layouts import OCTET, Layout, Part

CHUNK = 16          # bytes that one copy takes, at most
Shares = Callable[[int, int], list[tuple[UOp, UOp]]]    # (rows, items of each) -> those of a thread


@dataclass(frozen=True)
class Factor:
    """A packed matrix in a kernel; `row`: which of its rows is a block's row with that number."""
    layout: Layout
    arrays: tuple[UOp, ...]
    row: Callable[[UOp], UOp]


def stride(part: Part) -> int:
    """Items from row to row in shared memory: of long rows more than they have, so that rows lie in other banks."""
    items, size = STAGE // part.span * part.items, part.dtype.itemsize
    return items + (CHUNK // size if items * size >= 2 * CHUNK else 0)


def staged(part: Part) -> bool:
    """Whether a stage has whole items of an array. Of others (K formats' scales) threads read the array itself."""
    return part.span <= STAGE


def neighbours(buffer: UOp, cell: UOp, count: int) -> list[UOp]:
    """The items of a cell, in one load. (tinygrad leaves an int32 alone, and so sees that they are neighbours.)"""
    cell = cell.cast(dtypes.int).cast(dtypes.weakint)
    return [buffer.index(cell * count + n).load() for n in range(count)]


@dataclass
class Copy:
    """Items that a thread copies in each stage: into a room, from a row of an array, `items` a stage."""
    room: int
    place: UOp
    array: UOp
    row: UOp
    items: int
    first: UOp
    count: int

    def statements(self, buffer: UOp, place: UOp, stage: UOp, wanted: UOp, device: str) -> list[UOp]:
        """The copy for a stage. Where none is wanted, nothing is read. (In tinygrad's emulator, which has no such
        instruction, items are loaded and stored.)"""
        to, start = place + self.place, stage * self.items + self.first
        if not tuning.is_cuda(device):
            return [buffer.index(to + n).store(self.array.index(self.row, start + n).load())
                    for n in range(self.count)]
        size = self.count * buffer.dtype.itemsize
        how = "cg" if size == CHUNK else "ca"       # through the L2 cache alone, or the L1 cache, too
        text = f'asm volatile("cp.async.{how}.shared.global [%0], [%1], {size}, %2;" :: ' \
               '"r"((uint)__cvta_generic_to_shared({0})), "l"({1}), "r"({2}) : "memory");'
        some = wanted.where(UOp.const(size, dtypes.int), UOp.const(0, dtypes.int))
        return [UOp(Ops.CUSTOM, dtypes.void, (buffer.index(to), self.array.index(self.row, start), some), text)]


@dataclass
class Stages:
    """The stages of a kernel: rooms in shared memory, each with a slot for `slots` stages; and who copies what. First
    say what there is, then `run`, then use it. `loops`, at most `most`: how many stages there are."""
    slots: int
    loops: UOp
    most: int
    device: str
    rooms: list[UOp] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)
    stage: UOp | None = None
    slot: UOp | None = None

    def room(self, size: int, dtype: DType, number: int) -> int:
        """A new room, for so many items a stage, by its number here."""
        self.rooms.append(UOp.placeholder((self.slots * size,), dtype, number, AddrSpace.LOCAL))
        self.sizes.append(size)
        return len(self.rooms) - 1

    def take(self, room: int, place: UOp, array: UOp, row: UOp, items: int, first: UOp, count: int) -> None:
        """Have this thread copy, in each stage, `count` of the row's `items` from `first` on."""
        self.copies.append(Copy(room, place, array, row, items, first, count))

    def windows(self, factor: Factor, rows: int, shares: Shares, number: int) -> tuple["Window", ...]:
        """Have so many rows of a factor copied, and say how to read them."""
        found = []
        for n, (part, array) in enumerate(zip(factor.layout.parts, factor.arrays, strict=True)):
            room, items = None, STAGE // part.span * part.items
            if staged(part):
                room, size = self.room(rows * stride(part), array.dtype, number + n), min(
                    items, CHUNK // part.dtype.itemsize)
                for local, chunk in shares(rows, items // size):
                    self.take(room, local * stride(part) + chunk * size, array, factor.row(local), items, chunk * size,
                              size)
            found.append(Window(self, factor, part, array, room))
        return tuple(found)

    def run(self) -> UOp:
        """The loop over stages. In each, threads wait until its items are there and all have done with the stage
        before; then the copies for a later one start."""
        cuda, before = tuning.is_cuda(self.device), []
        self.stage = UOp.range(self.loops, 5, AxisType.REDUCE)
        for k in range(self.slots - 1):
            copies = self._copies(const(k), const(k), [room.after(*before) for room in self.rooms])
            before = [said("cp.async.commit_group", *before, *copies)] if cuda else copies
        if cuda:
            before = [said(f"cp.async.wait_group {self.slots - 2}", self.stage, *before)]
        ready = UOp.barrier(self.stage, *before)
        later = self.stage + (self.slots - 1)
        copies = self._copies(later, self._slot(later), [room.after(ready) for room in self.rooms])
        self.slot = self._slot(self.stage)
        if cuda:        # what is made of the slot's number comes behind the copies
            self.slot = self.slot + marked("cp.async.commit_group", self.stage, *copies)
        else:
            ready = UOp.barrier(*copies)
        self.rooms = [room.after(ready) for room in self.rooms]
        return self.stage

    def _slot(self, stage: UOp) -> UOp:
        return stage - stage // self.slots * self.slots

    def _copies(self, stage: UOp, slot: UOp, rooms: list[UOp]) -> list[UOp]:
        wanted, stage = stage < self.loops, stage.minimum(self.most - 1)
        return [one for copy in self.copies for one in copy.statements(
            rooms[copy.room], slot * self.sizes[copy.room], stage, wanted, self.device)]

    def at(self, room: int) -> tuple[UOp, UOp]:
        """A room's buffer, and where in it this stage begins."""
        return self.rooms[room], self.slot * self.sizes[room]

    def first(self, layout: Layout) -> UOp:
        """The number of a stage's first octet, for `Layout.octet` with windows: 0, unless some items are not its own.
        """
        return const(0) if all(map(staged, layout.parts)) else self.stage * (STAGE // OCTET)


@dataclass(frozen=True)
class Window:
    """One array of a factor as a stage has it: indexed by a block's rows, and by items as `Stages.first` counts."""
    stages: Stages
    factor: Factor
    part: Part
    array: UOp
    room: int | None

    def index(self, row: UOp, item: UOp) -> UOp:
        """An item's place; row: the block's."""
        if self.room is None:
            return self.array.index(self.factor.row(row), item)
        buffer, start = self.stages.at(self.room)
        if not all(map(staged, self.factor.layout.parts)):
            item = item - self.stages.stage * (STAGE // self.part.span * self.part.items)
        return buffer.index(start + row * stride(self.part) + item)


def said(text: str, *after: UOp) -> UOp:
    """A statement of CUDA's own."""
    return UOp(Ops.CUSTOM, dtypes.void, after, f'asm volatile("{text};" ::: "memory");')


def marked(text: str, loop: UOp, *after: UOp) -> UOp:
    """The same in a loop, as a number: 0, for what must come behind it to be made of. (tinygrad 0.14 knows no other
    effects than stores and barriers.)"""
    return UOp(Ops.CUSTOM, dtypes.int, (loop, *after), f'0; asm volatile("{text};" ::: "memory")').cast(dtypes.weakint)
