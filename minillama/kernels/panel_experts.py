"""A prompt's experts on a CPU, by panels (`panels.py`): both halves of their networks, each in one kernel.

A panel serves all tokens of an expert: a kernel goes through the experts, through each one's panels, and through as
many blocks of tokens as the expert has.
"""
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from minillama.kernels.block import const
from minillama.kernels.packed import Packed
from minillama.kernels.panels import Panels
from minillama.kernels.product import number, result
from minillama.program_cache import at_most


@dataclass(frozen=True)
class Blocks:
    """Blocks of `size` places (as many as a block of `Panels` has tokens), each with assignments of one expert: `rows`
    (places,) int32, the assignment in each place, below 0 for none; `firsts`, `ends` (experts,) int32, an expert's
    first block and the one behind its last."""
    size: int
    rows: Tensor
    firsts: Tensor
    ends: Tensor

    @property
    def places(self) -> int:
        return self.rows.shape[0]

    @property
    def most(self) -> int:
        """Blocks of all experts together, at most."""
        return self.places // self.size

    def of(self, expert: UOp, firsts: UOp, ends: UOp) -> tuple[UOp, UOp]:
        """In a kernel: an expert's first block, and how many it has. One that has none does the last of all, which
        then is nobody's."""
        first, many = firsts.index(expert).load(), ends.index(expert).load() - firsts.index(expert).load()
        return (many > 0).where(first, self.most - 1).maximum(0).minimum(self.most - 1).cast(dtypes.weakint), many


def gated(x: Tensor, gate: Packed, up: Packed, share: Tensor, blocks: Blocks) -> Tensor:
    """silu(gate x) * (up x) * share of every assignment: (places, width). In padding 0; behind all blocks, anything.

    x (tokens, hidden); gate, up (experts, width, hidden); share (tokens, used).
    """
    (tokens, used), (experts, width, hidden), device = share.shape, gate.shape, x.device

    def kernel(out: UOp, x: UOp, share: UOp, rows: UOp, firsts: UOp, ends: UOp, *arrays: UOp) -> UOp:
        make = Panels(device, width, blocks.size)
        expert, top = make.outer(experts, shared=True), make.parts(width, make.rows, shared=True)
        panels = pair(make, gate, up, arrays, expert * width + top)
        first, many = blocks.of(expert, firsts, ends)
        turn, end = make.turns(many, blocks.most)
        place = (first + turn) * make.tokens
        found = [number(rows.index(place + t), tokens * used) for t in range(make.tokens)]      # in padding anyone
        g, u = (make.block(panel, lambda t, column: x.index(found[t] // used, column).load()) for panel in panels)

        def store(t: int, row: UOp) -> UOp:
            part = share.index(found[t] // used, found[t] % used).load()
            part = (rows.index(place + t).load() < 0).where(UOp.const(0.0), part)
            y = g.index(const(t), row).load().silu() * u.index(const(t), row).load() * part
            return out.index(place + t, top + row).store(y)
        name = f"panels_gated_{gate.format}_{up.format}_{tokens}_{used}_{experts}_{width}_{hidden}"
        name = at_most(name, 2 * blocks.places * width * hidden, out, x, share, rows, *arrays)
        return make.kernel(name, end(make.each(store)))
    return result(blocks.places, width, like=x).custom_kernel(
        x, share, blocks.rows, blocks.firsts, blocks.ends, *gate.arrays, *up.arrays, fxn=kernel)[0]


def shared_gated(x: Tensor, gate: Packed, up: Packed, share: Tensor) -> Tensor:
    """The same for the expert that sees every token: (tokens, width). x (tokens, hidden); gate, up (width, hidden);
    share (tokens,)."""
    (tokens, hidden), width, device = x.shape, gate.rows, x.device

    def kernel(out: UOp, x: UOp, share: UOp, *arrays: UOp) -> UOp:
        make = Panels(device, width, tokens)
        top = make.parts(width, make.rows, shared=True)
        panels = pair(make, gate, up, arrays, top)
        start = make.parts(tokens, make.tokens)
        g, u = (make.block(panel, lambda t, column: x.index(start + t, column).load()) for panel in panels)

        def store(t: int, row: UOp) -> UOp:
            y = g.index(const(t), row).load().silu() * u.index(const(t), row).load() * share.index(start + t).load()
            return out.index(start + t, top + row).store(y)
        return make.kernel(f"panels_shared_{gate.format}_{up.format}_{tokens}_{width}_{hidden}", make.each(store))
    return result(tokens, width, like=x).custom_kernel(x, share, *gate.arrays, *up.arrays, fxn=kernel)[0]


def pair(make: Panels, gate: Packed, up: Packed, arrays: tuple[UOp, ...], first: UOp) -> list[UOp]:
    """The same rows of both matrices, from number `first` on, as panels."""
    split = len(gate.arrays)
    return [make.panel(weight.layout, mine, first, weight.columns)
            for weight, mine in ((gate, arrays[:split]), (up, arrays[split:]))]


def mixed(h: Tensor, down: Packed, blocks: Blocks) -> Tensor:
    """What each assignment adds: down · h, (places, hidden). h (places, width) as `gated` leaves it; down (experts,
    hidden, width)."""
    (experts, hidden, width), device = down.shape, h.device

    def kernel(out: UOp, h: UOp, firsts: UOp, ends: UOp, *arrays: UOp) -> UOp:
        make = Panels(device, hidden, blocks.size)
        expert, top = make.outer(experts, shared=True), make.parts(hidden, make.rows, shared=True)
        panel = make.panel(down.layout, arrays, expert * hidden + top, width)
        first, many = blocks.of(expert, firsts, ends)
        turn, end = make.turns(many, blocks.most)
        place = (first + turn) * make.tokens
        sums = make.block(panel, lambda t, column: h.index(place + t, column).load())
        stores = make.each(lambda t, row: out.index(place + t, top + row).store(sums.index(const(t), row).load()))
        name = f"panels_mixed_{down.format}_{blocks.places}_{experts}_{hidden}_{width}"
        return make.kernel(at_most(name, blocks.places * hidden * width, out, h, *arrays), end(stores))
    return result(blocks.places, hidden, like=h).custom_kernel(
        h, blocks.firsts, blocks.ends, *down.arrays, fxn=kernel)[0]
