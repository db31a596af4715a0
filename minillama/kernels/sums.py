"""Sums inside kernels: over a loop, or over *lanes*, threads that each add up a part and then meet."""
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels.block import const, shared_memory
from minillama.kernels.tuning import Cut, written_out

BOARD = 11      # the numbers of the rooms where lanes meet


def counter(size: int, number: int) -> UOp:
    """What a sum runs over, 0 .. size - 1; the optimizer wants no loop of one."""
    return UOp.range(size, number, AxisType.REDUCE) if size > 1 else const(0)


def added(x: UOp, *over: UOp) -> UOp:
    """The sum of an expression over counters."""
    over = [i for i in over if i.op is Ops.RANGE]
    return x.reduce(*over, arg=Ops.ADD) if over else x


Part = Callable[[UOp, UOp, UOp, UOp], UOp]     # (row, token, number of the first octet, term of an outer sum) -> sum


@dataclass(frozen=True)
class Rows:
    """Sums along `rows` rows of `octets` octets each, for each of `tokens` tokens, cut as `tuning.product` says.

    Without lanes a loop does it. With them a bundle of threads does `cut.each` rows: a lane takes a step of some
    octets, the next lane the next step, and when all have done their share, two meetings add it up: first each lane
    adds some lanes' sums, then each adds what is left of one row's, and is the one to go on with that row.
    """
    device: str
    rows: int
    octets: int
    tokens: int
    cut: Cut

    def sums(self, *parts: Part, outer: int = 1, once: Part | None = None) -> "Summed":
        """The sum of each part over all octets of a row, and over `outer` terms; `once` is added to the first part's,
        not for each term of it. (Only where the terms are `tuning.written_out`.)"""
        return (self._over_lanes if self.cut.lanes > 1 else self._in_loops)(parts, outer, once)

    def _in_loops(self, parts: tuple[Part, ...], outer: int, once: Part | None) -> "Summed":
        row, token, i, term = UOp.range(self.rows, 0), UOp.range(self.tokens, 1), counter(
            self.octets // self.cut.step, 2), counter(outer, 3)
        return Summed([added(part(row, token, i * self.cut.step, term), term, i) for part in parts], row, token, row,
                      (row, token), self.cut.opts)

    def _over_lanes(self, parts: tuple[Part, ...], outer: int, once: Part | None) -> "Summed":
        c, own = self.cut, self.cut.each * self.tokens
        block, lane = UOp.range(self.rows // (c.each * c.groups), 0), UOp.range(c.lanes, 1, AxisType.LOCAL)
        bundle = UOp.range(c.groups, 2, AxisType.LOCAL) if c.groups > 1 else const(0)
        first, loop = (block * c.groups + bundle) * c.each, counter(self.octets // (c.step * c.lanes * c.turns), 3)
        written = written_out(self.device, outer)
        term = const(0) if written else counter(outer, 4)

        def mine(part: Part, row: UOp, token: UOp) -> UOp:
            steps = [((loop * c.turns + turn) * c.lanes + lane) * c.step for turn in range(c.turns)]
            found = [part(row, token, i, n) for n in (map(const, range(outer)) if written else [term]) for i in steps]
            if once and part is parts[0]:
                found += [once(row, token, i, term) for i in steps]
            return added(sum(found[1:], found[0]), term, loop)
        found = [mine(part, first + r, const(t)) for part in parts for r in range(c.each) for t in range(self.tokens)]
        sums = met(found, lane, c.lanes, bundle, c.groups)
        last = lane.minimum(own - 1)                # this lane's row and token, of its bundle's
        row = last // self.tokens
        totals = [sums(last + p * own) for p in range(len(parts))]
        return Summed(totals, first + row, last - row * self.tokens, (first + row).valid(lane < own),
                      tuple(r for r in (block, lane, bundle) if r.op is Ops.RANGE), ())


@dataclass(frozen=True)
class Summed:
    """The sums of one row and token. `place`: the row to write to, by one thread alone; `ranges`: what is to end."""
    totals: list[UOp]
    row: UOp
    token: UOp
    place: UOp
    ranges: tuple[UOp, ...]
    opts: tuple

    def end(self, name: str, *stores: UOp, over: tuple[UOp, ...] = ()) -> UOp:
        """The kernel; `over`: further ranges of its own."""
        return UOp.group(*stores).end(*self.ranges, *over).sink(arg=KernelInfo(name, opts_to_apply=self.opts))


def met(found: list[UOp], lane: UOp, lanes: int, bundle: UOp, bundles: int) -> Callable[[UOp], UOp]:
    """All lanes of a bundle have found so many values each: sums over them, by the value's number."""
    count, shares = len(found), 1                   # lanes that share a value at the first meeting
    while 2 * shares * count <= lanes and shares * shares < lanes:
        shares *= 2
    board = shared_memory(BOARD, bundles, lanes, count)
    board = board.after(UOp.barrier(*(board.index(bundle, lane, const(n)).store(x) for n, x in enumerate(found))))
    if shares == 1:
        return lambda n: sum(board.index(bundle, const(other), n).load() for other in range(lanes))
    rest, size, value = shared_memory(BOARD + 1, bundles, count, shares), lanes // shares, lane // shares
    share, value = lane - value * shares, value.minimum(count - 1)
    partial = sum(board.index(bundle, share * size + n, value).load() for n in range(size))
    rest = rest.after(UOp.barrier(rest.index(bundle, value, share).store(partial)))
    return lambda n: sum(rest.index(bundle, n, const(other)).load() for other in range(shares))
