"""A prompt's experts as products of tiles (`gemm.py`): both halves of their networks, each in one kernel."""
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.dtype import AddrSpace
from tinygrad.uop.ops import KernelInfo, UOp

from minillama import program_cache
from minillama.kernels import tuning
from minillama.kernels.bits import FLOAT
from minillama.kernels.block import const
from minillama.kernels.gemm import Block, tiling
from minillama.kernels.halves import STAGE, SUMMED, Halves, order, stored
from minillama.kernels.layouts import Layout
from minillama.kernels.packed import Packed
from minillama.kernels.product import number, result
from minillama.kernels.staging import Factor

program_cache.install()     # which counts these kernels
GATED, PAD = 22, 4          # a shared buffer's number; columns that keep its rows in different banks


@dataclass(frozen=True)
class Tiles:
    """Which rows of x a tile of `size` places has, and whose weights: `experts` (tiles,) int32, below 0 for a tile
    that nobody fills; `rows` (places,) int32, the assignment in each place, below 0 for none; a token has `used`."""
    size: int
    experts: Tensor
    rows: Tensor
    used: int

    @property
    def count(self) -> int:
        return self.experts.shape[0]


def gated(x: Halves, gate: Packed, up: Packed, down: Layout, share: Tensor, tiles: Tiles | None = None) -> Halves:
    """silu(gate x) * (up x) * share, for weights of the layout `down`: (places, width), 0 where nobody is.

    gate, up (experts, width, hidden); share (assignments,). Without `tiles` there is one expert, for all tokens: gate,
    up (width, hidden); share (tokens,).
    """
    *_, width, hidden = gate.shape
    tokens, experts, stages, device = x.parts.shape[0], gate.rows // width, hidden // STAGE, x.parts.device
    size = tiles.size if tiles else tuning.fitting(16, tokens)
    count, pairs, split = tiles.count if tiles else tokens // size, order(down), len(gate.arrays)
    cut = tiling(size, width, gate, up, besides=size)
    block, given = Block(cut, device), [tiles.experts, tiles.rows] if tiles else []

    def kernel(parts: UOp, sums: UOp, x_parts: UOp, x_sums: UOp, share: UOp, *buffers: UOp) -> UOp:
        first, t, arrays = UOp.range(width // cut.rows, 0), UOp.range(count, 1), buffers[len(given):]
        whose, rows = buffers[:2] if tiles else (None, None)

        def row(local: UOp) -> UOp:
            return (number(whose.index(t), experts) * width if tiles else 0) + first * cut.rows + local

        def token(local: UOp) -> UOp:
            place = t * size + local
            return number(rows.index(place), tokens * tiles.used) // tiles.used if tiles else place
        found = block.sums([Factor(gate.layout, arrays[:split], row), Factor(up.layout, arrays[split:], row)], x_parts,
                           x_sums, token, loops(whose.index(t), stages, device) if tiles else const(stages), stages)
        room, half = UOp.placeholder((size, cut.rows + PAD), FLOAT, GATED, AddrSpace.LOCAL), len(found) // 2
        room = room.after(UOp.barrier(*(room.index(column, local).store(g.silu() * u) for local, column, g, u in zip(
            *block.places(), found[:half], found[half:], strict=True))))
        stores = []
        for local, at in block.shares(size, cut.rows // SUMMED):
            place = t * size + local
            if tiles:
                part = share.index(number(rows.index(place), tokens * tiles.used)).load()
                part = (rows.index(place).load() < 0).where(UOp.const(0.0), part)
            else:
                part = share.index(place).load()
            values = [room.index(local, at * SUMMED + k).load() * part for k in range(SUMMED)]
            stores += stored(parts, sums, place, first * (cut.rows // SUMMED) + at, values, pairs, device)
        name = f"gemm_gated_{gate.format}_{up.format}_{count}_{size}_{width}_{hidden}"
        return UOp.group(*stores).end(first, t, *block.ranges).sink(arg=KernelInfo(name, opts_to_apply=()))
    made = Halves.empty(count * size, width, device)
    return Halves(*made.parts.custom_kernel(made.sums, x.parts, x.sums, share, *given, *gate.arrays, *up.arrays,
                                            fxn=kernel)[:2])


def mixed(h: Halves, down: Packed, tiles: Tiles) -> Tensor:
    """What each assignment adds: down · h, (places, hidden); where nobody is, anything. h (places, width), as `gated`
    leaves it; down (experts, hidden, width)."""
    (experts, hidden, width), size, device = down.shape, tiles.size, h.parts.device
    cut, stages = tiling(size, hidden, down), width // STAGE
    block = Block(cut, device)

    def kernel(out: UOp, whose: UOp, parts: UOp, sums: UOp, *arrays: UOp) -> UOp:
        first, t = UOp.range(hidden // cut.rows, 0), UOp.range(tiles.count, 1)

        def row(local: UOp) -> UOp:
            return number(whose.index(t), experts) * hidden + first * cut.rows + local
        found = block.sums([Factor(down.layout, arrays, row)], parts, sums, lambda local: t * size + local,
                           loops(whose.index(t), stages, device), stages)
        stores = [out.index(t * size + column, first * cut.rows + local).store(y)
                  for local, column, y in zip(*block.places(), found, strict=True)]
        name = f"gemm_mixed_{down.format}_{tiles.count}_{size}_{hidden}_{width}"
        return UOp.group(*stores).end(first, t, *block.ranges).sink(arg=KernelInfo(name, opts_to_apply=()))
    return result(tiles.count * size, hidden, like=h.parts).custom_kernel(
        tiles.experts, h.parts, h.sums, *down.arrays, fxn=kernel)[0]


def loops(expert: UOp, stages: int, device: str) -> UOp:
    """Stages of a tile: none where it has no expert. (In tinygrad's emulator one: there a loop runs once at least. And
    where a tile has just one, always that: tinygrad 0.14 knows no loop that runs once or not at all.)"""
    if stages == 1:
        return const(1)
    least = int(not tuning.is_cuda(device))
    return (expert.load() < 0).where(*(UOp.const(n, dtypes.weakint) for n in (least, stages)))
