"""Sums inside kernels: over a loop, or over *lanes*, threads that each add up a part and then combine their parts."""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.bits import BITS, HALF, AsHalves, apart, converts_halves
from minillama.kernels.block import const, shared_memory
from minillama.kernels.layouts import OCTET, Layout
from minillama.kernels.tuning import Tiling, unrolled

LANE_SUMS = 11         # number of the first of two shared buffers


def counter(size: int, number: int) -> UOp:
    """The range of a sum, 0 .. size - 1; the optimizer wants no loop of one."""
    return UOp.range(size, number, AxisType.REDUCE) if size > 1 else const(0)


def added(x: UOp, *over: UOp) -> UOp:
    """The sum of an expression over counters."""
    over = [i for i in over if i.op is Ops.RANGE]
    return x.reduce(*over, arg=Ops.ADD) if over else x


Value = Callable[[UOp, UOp, UOp, int], UOp]     # (token, term of an outer sum, octet, place in it) -> a vector's value
Part = Callable[[UOp, UOp, UOp, UOp], UOp]      # (row, token, number of the first octet, term) -> sum
Prefetch = Callable[[UOp, UOp], list[UOp]]      # (token, row) -> values that are needed once the sums are done


def nothing(token: UOp, row: UOp) -> list[UOp]:
    return []


@dataclass(frozen=True)
class Vectors:
    """The vectors that rows are multiplied with: their values in a kernel. Where their RMS norm is still to be
    applied, `plain` are the values without the norm's weight, `eps` is the norm's, and the finished sums are
    scaled."""
    value: Value
    plain: Value | None = None
    eps: float = 0.0

    def scale(self, squares: UOp, size: int) -> UOp:
        """The factor for finished sums, from the sum of `size` squares."""
        return (squares * (1 / size) + self.eps).rsqrt()


def dot(layout: Layout, arrays: tuple[UOp, ...], row: UOp, first: UOp, step: int, value: Callable[[UOp, int], UOp],
        in_place: bool = False) -> UOp:
    """The share of `step` octets, from number `first` on, in the product of a row with a vector: an expression.

    `value(i, k)` is the vector's value at place k of octet i; `in_place`: see `Octet.times`.
    """
    parts = [layout.octet(*arrays, row, first + j).times([value(first + j, k) for k in range(OCTET)], in_place)
             for j in range(step)]
    return sum(parts[1:], parts[0])


@dataclass(frozen=True)
class Factor:
    """A product in a kernel, of rows of a packed matrix with vectors: `row` (row, term) is the matrix's row."""
    layout: Layout
    arrays: tuple[UOp, ...]
    row: Callable[[UOp, UOp], UOp]
    x: Vectors

    def part(self, step: int, device: str) -> Part:
        """The share of `step` octets. (Quants are multiplied in place where a device can do that, and bits of halves
        read as halves.)"""
        in_place, converts = tuning.multiplies_subnormals(device), converts_halves(device)
        arrays = tuple(AsHalves(array) if converts and part.dtype is HALF and array.dtype is BITS else array
                       for array, part in zip(self.arrays, self.layout.parts, strict=True))
        return lambda row, token, first, term: dot(
            self.layout, arrays, self.row(row, term), first, step,
            lambda i, k: self.x.value(token, term, i, k), in_place)


@dataclass(frozen=True)
class Rows:
    """Sums along `rows` rows of `octets` octets each, for each of `tokens` tokens, tiled as `tuning.product` says.

    Without lanes it is a loop. With lanes, a subgroup of threads computes `cut.each` rows: lanes take alternate steps
    of some octets, then a reduction in two stages through shared memory adds up their parts; each lane ends with the
    sum of one row and token, and goes on with it.
    """
    device: str
    rows: int
    octets: int
    tokens: int
    cut: Tiling

    def sums(self, *factors: Factor | Part, outer: int = 1, once: Factor | None = None, prefetch: Prefetch = nothing,
             ) -> "Summed":
        """The sum of each factor, or part, over all octets of a row and over `outer` terms; `once` is added to the
        first sum a single time (only where the terms are `tuning.unrolled`). `prefetch`: values to load before the
        reduction, so that their latency is hidden."""
        def part(one: Factor | Part) -> Part:
            return one.part(self.cut.step, self.device) if isinstance(one, Factor) else one
        parts, x = [part(one) for one in factors], factors[0].x
        if x.plain:
            parts.append(lambda _, token, first, term: sum(
                x.plain(token, term, first + j, k).square() for j in range(self.cut.step) for k in range(OCTET)))
        form = self._over_lanes if self.cut.lanes > 1 else self._in_loops
        found = form(parts, outer, once and part(once), prefetch)
        if not x.plain:
            return found
        *totals, squares = found.totals
        scale = x.scale(squares, self.octets * OCTET)
        return replace(found, totals=[y * scale for y in totals], scale=scale)

    def _in_loops(self, parts: list[Part], outer: int, once: Part | None, prefetch: Prefetch) -> "Summed":
        row, token, i, term = UOp.range(self.rows, 0), UOp.range(self.tokens, 1), counter(
            self.octets // self.cut.step, 2), counter(outer, 3)
        totals = [added(part(row, token, i * self.cut.step, term), term, i) for part in parts]
        return Summed(totals, row, token, apart(row), (row, token), self.cut.opts, prefetch(token, row))

    def _over_lanes(self, parts: list[Part], outer: int, once: Part | None, prefetch: Prefetch) -> "Summed":
        c, own = self.cut, self.cut.each * self.tokens
        block, lane = UOp.range(self.rows // (c.each * c.groups), 0), UOp.range(c.lanes, 1, AxisType.LOCAL)
        subgroup = UOp.range(c.groups, 2, AxisType.LOCAL) if c.groups > 1 else const(0)
        first, loop = (block * c.groups + subgroup) * c.each, counter(self.octets // (c.step * c.lanes * c.turns), 3)
        written = unrolled(self.device, outer)
        term = const(0) if written else counter(outer, 4)

        def mine(part: Part, row: UOp, token: UOp) -> UOp:
            steps = [((loop * c.turns + turn) * c.lanes + lane) * c.step for turn in range(c.turns)]
            found = [part(row, token, i, n) for n in (map(const, range(outer)) if written else [term]) for i in steps]
            if once and part is parts[0]:
                found += [once(row, token, i, term) for i in steps]
            return added(sum(found[1:], found[0]), term, loop)
        found = [mine(part, first + r, const(t)) for part in parts for r in range(c.each) for t in range(self.tokens)]
        last = lane.minimum(own - 1)                # this lane's row and token, of its subgroup's
        row = last // self.tokens
        token = last - row * self.tokens
        soon = prefetch(token, first + row)
        sums, _ = lane_sums(found, lane, c.lanes, subgroup, c.groups, soon)
        totals = [sums(last + p * own) for p in range(len(parts))]
        return Summed(totals, first + row, token, (first + row).valid(lane < own),
                      tuple(r for r in (block, lane, subgroup) if r.op is Ops.RANGE), (), soon)


@dataclass(frozen=True)
class Summed:
    """The sums of one row and token. `place`: the row to write to, valid in one thread alone; `ranges`: to be ended by
    the kernel; `prefetched`: the values asked for; `scale`: of the vectors, where their norm was still to be applied
    (the totals are scaled already)."""
    totals: list[UOp]
    row: UOp
    token: UOp
    place: UOp
    ranges: tuple[UOp, ...]
    opts: tuple
    prefetched: list[UOp]
    scale: UOp | None = None

    def end(self, name: str, *stores: UOp, over: tuple[UOp, ...] = ()) -> UOp:
        """The kernel; `over`: further ranges of its own."""
        return UOp.group(*stores).end(*self.ranges, *over).sink(arg=KernelInfo(name, opts_to_apply=self.opts))


def lane_sums(found: list[UOp], lane: UOp, lanes: int, subgroup: UOp, subgroups: int, besides: Iterable[UOp] = (),
              ) -> tuple[Callable[[UOp], UOp], UOp]:
    """Reduces over the lanes of a subgroup, each of which has found so many values: the sums, by the value's number;
    and the first barrier, which also waits for `besides`, stores and loads."""
    count, shares = len(found), tuning.lanes_per_value(len(found), lanes)
    shared = shared_memory(LANE_SUMS, subgroups, lanes, count)
    ready = UOp.barrier(*(shared.index(subgroup, lane, const(n)).store(x) for n, x in enumerate(found)), *besides)
    shared = shared.after(ready)
    if shares == 1:
        return lambda n: sum(shared.index(subgroup, const(other), n).load() for other in range(lanes)), ready
    rest, size, value = shared_memory(LANE_SUMS + 1, subgroups, count, shares), lanes // shares, lane // shares
    share, value = lane - value * shares, value.minimum(count - 1)
    partial = sum(shared.index(subgroup, share * size + n, value).load() for n in range(size))
    rest = rest.after(UOp.barrier(rest.index(subgroup, value, share).store(partial)))
    return lambda n: sum(rest.index(subgroup, n, const(other)).load() for other in range(shares)), ready
