"""Experts for a prompt: tokens that picked the same expert share one reading of it.

Every (token, chosen expert) pair is an *assignment*. They are sorted by expert on the device, each expert's share is
padded to whole *tiles* of rows, and a tile is a small product with one expert's weights, looked up by the tile's
number. Where the router sends everything to one expert, that one simply has more tiles.
"""
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels import gemm_experts, halves, panel_experts, tensor_cores, tuning
from minillama.kernels.cores import on_cpu
from minillama.kernels.layouts import OCTET
from minillama.kernels.packed import Packed
from minillama.kernels.panels import block_sums
from minillama.kernels.product import number, result
from minillama.kernels.steps import Steps
from minillama.kernels.sums import added, counter, dot


@dataclass(frozen=True)
class Groups:
    """Where assignments lie once they are sorted. `rows` (tiles * tile,) int32 is the assignment in each place, -1 in
    padding; `experts` (tiles,) int32 that of each tile, -1 if nobody fills it; `places` (tokens, used) int32 where
    each assignment went; `firsts`, `ends` (experts,) int32 each expert's first tile and the one behind its last."""
    tile: int
    rows: Tensor
    experts: Tensor
    places: Tensor
    firsts: Tensor
    ends: Tensor


def tiles_for(assignments: int, experts: int, tile: int) -> int:
    """Tiles that always suffice: each expert may leave one unfilled. Where any has none, the last is nobody's."""
    return max(1, assignments // tile) + min(experts, assignments)


def group(ids: Tensor, experts: int) -> Groups:
    """Sort assignments by expert, in the tokens' order. ids (tokens, used) int32."""
    (tokens, used), assignments = ids.shape, ids.numel()
    panels = on_cpu(ids.device)
    tile = block_sums(ids.device)[0] if panels else tuning.tile_rows(ids.device, assignments, experts)
    tiles, flat = tiles_for(assignments, experts, tile), ids.reshape(assignments).contiguous()
    counts = (flat.reshape(-1, 1) == Tensor.arange(experts)).sum(0, dtype=dtypes.int32)         # (experts,)
    ends = ((counts + tile - 1) // tile).cumsum().cast(dtypes.int32).contiguous()               # in tiles
    firsts = (ends - (counts + tile - 1) // tile).contiguous()
    of_tile = (Tensor.arange(tiles).reshape(-1, 1) >= ends).sum(1, dtype=dtypes.int32)
    of_tile = (of_tile < experts).where(of_tile, -1)
    lanes = tuning.lanes(ids.device, assignments)

    def place_kernel(places: UOp, flat: UOp, firsts: UOp) -> UOp:
        mine, other = UOp.range(assignments, 0), counter(assignments, 1)
        expert = flat.index(mine).load()
        before = (flat.index(other).load().eq(expert) & (other < mine)).cast(dtypes.int32)
        place = firsts.index(expert.cast(dtypes.weakint)).load() * tile + added(before, other)
        return places.index(mine).store(place).end(mine).sink(
            arg=KernelInfo(f"place_{assignments}", opts_to_apply=tuning.grouped(lanes)))

    def place_in_turn(places: UOp, flat: UOp, firsts: UOp) -> UOp:
        """One after the other, in one thread: each expert's next free place is remembered."""
        steps = Steps(ids.device)
        free, expert = steps.room(experts, dtype=dtypes.int32), steps.loop(experts)
        steps.do((expert,), free.index(expert).store(firsts.index(expert).load() * tile))
        mine = steps.loop(assignments)
        cell = steps.now(free, mine).index(number(flat.index(mine), experts))
        place = cell.load()
        steps.do((mine,), places.index(mine).store(place), cell.store(place + 1))
        return steps.kernel(f"place_{assignments}")

    def row_kernel(rows: UOp, places: UOp) -> UOp:
        mine = UOp.range(assignments, 0)
        return rows.index(number(places.index(mine), tiles * tile)).store(mine.cast(dtypes.int32)).end(mine).sink(
            arg=KernelInfo(f"rows_of_tiles_{assignments}"))
    places = Tensor.empty(assignments, dtype=dtypes.int32, device=ids.device)
    places = places.custom_kernel(flat, firsts, fxn=place_in_turn if panels else place_kernel)[0]
    nobody = Tensor.full((tiles * tile,), -1, dtype=dtypes.int32, device=ids.device).contiguous()
    rows = nobody.custom_kernel(places, fxn=row_kernel)[0]
    return Groups(tile, rows, of_tile.contiguous(), places.reshape(tokens, used), firsts, ends)


def experts(x: Tensor, gate: Packed, up: Packed, down: Packed, groups: Groups, share: Tensor) -> Tensor:
    """Every token's chosen experts, added up: (tokens, hidden). x (tokens, hidden); gate, up (experts, width, hidden);
    down (experts, hidden, width); share (tokens, used)."""
    if tuning.uses_mma(x.device) and halves.fits(gate, up) and halves.fits(down):
        tiles = gemm_experts.Tiles(groups.tile, groups.experts, groups.rows, share.shape[1])
        h = gemm_experts.gated(halves.halves(x, gate.layout), gate, up, down.layout, share.reshape(-1), tiles)
        return summed(gemm_experts.mixed(h, down, tiles), groups)
    if all(tuning.multiplies_halves(x.device, weight.shape[1]) and tensor_cores.fits(weight)
           for weight in (gate, up, down)):
        return summed(in_halves(x, gate, up, down, groups, share), groups)
    if on_cpu(x.device):
        blocks = panel_experts.Blocks(groups.tile, groups.rows, groups.firsts, groups.ends)
        return summed(panel_experts.mixed(panel_experts.gated(x, gate, up, share, blocks), down, blocks), groups)
    return summed(mixed(gated(x, gate, up, groups, share), down, groups), groups)


def in_halves(x: Tensor, gate: Packed, up: Packed, down: Packed, groups: Groups, share: Tensor) -> Tensor:
    """What each assignment adds, (places, hidden), by tensor cores; where nobody is, anything."""
    tokens, used = share.shape
    halves = tensor_cores.halves(x)
    g, u = (tensor_cores.tiles(halves, weight, groups.experts, groups.tile, groups.rows, used)
            for weight in (gate, up))                                       # (places, width) each

    def value(place: UOp, column: UOp, g: UOp, u: UOp, share: UOp, rows: UOp) -> UOp:
        here = place.valid(rows.index(place).load() >= 0)                   # elsewhere nothing is read
        part = share.index(number(rows.index(place), tokens * used)).load()
        return g.index(here, column).load().silu() * u.index(here, column).load() * part
    h = tensor_cores.split(*g.shape, (g, u, share.reshape(tokens * used), groups.rows), value)
    return tensor_cores.tiles(h, down, groups.experts, groups.tile)


def owner(experts: UOp, tile: UOp, weight: Packed) -> UOp:
    """The expert of a tile; for an empty tile, any valid one. (Bounded above as well, it makes tinygrad join loads,
    and a GPU's registers then do not suffice for 16 tokens: measured on an H100.)"""
    found = experts.index(tile).load().maximum(0)
    return (found if tuning.shares_memory(weight.device) else found.minimum(weight.shape[0] - 1)).cast(dtypes.weakint)


def gated(x: Tensor, gate: Packed, up: Packed, groups: Groups, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * share of every assignment, in the tiles' order: (places, width); padding is 0.

    x (tokens, hidden); gate, up (experts, width, hidden); share (tokens, used). A thread does one row of both weights
    for all rows of a tile: it unpacks each octet once, and what it reads of x its neighbours read too.
    """
    hidden, used, width, tile = x.shape[1], share.shape[1], gate.shape[1], groups.tile
    octets, split, tiles = hidden // OCTET, len(gate.arrays), groups.experts.shape[0]
    step, opts = tuning.tiles(x.device, width, octets, tile)

    def kernel(out: UOp, x: UOp, share: UOp, rows: UOp, experts: UOp, *arrays: UOp) -> UOp:
        column, t, row = UOp.range(width, 0), UOp.range(tiles, 1), UOp.range(tile, 2)
        i = counter(octets // step, 3)
        at = owner(experts, t, gate) * width + column
        assignment = rows.index(t * tile + row).load()
        real, token = assignment >= 0, (assignment // used).cast(dtypes.weakint)

        def value(i: UOp, k: int) -> UOp:
            return x.index(token.valid(real), i * OCTET + k).load()
        g, u = (added(dot(weight.layout, mine, at, i * step, step, value), i)
                for weight, mine in ((gate, arrays[:split]), (up, arrays[split:])))
        part = share.index(token.valid(real), (assignment % used).cast(dtypes.weakint)).load()
        name = f"tiles_gated_{gate.format}_{up.format}_{tiles}_{tile}_{width}_{hidden}"
        return out.index(t * tile + row, column).store(g.silu() * u * part).end(column, t, row).sink(
            arg=KernelInfo(name, opts_to_apply=opts))
    return result(tiles * tile, width, like=x).custom_kernel(
        x, share, groups.rows, groups.experts, *gate.arrays, *up.arrays, fxn=kernel)[0]


def mixed(h: Tensor, down: Packed, groups: Groups) -> Tensor:
    """What each assignment adds: down · h, (places, hidden). h (places, width) as `gated` leaves it; down (experts,
    hidden, width)."""
    hidden, width, tile = down.shape[1], down.shape[2], groups.tile
    octets, tiles = width // OCTET, groups.experts.shape[0]
    step, opts = tuning.tiles(h.device, hidden, octets, tile)

    def kernel(out: UOp, h: UOp, experts: UOp, *arrays: UOp) -> UOp:
        column, t, row = UOp.range(hidden, 0), UOp.range(tiles, 1), UOp.range(tile, 2)
        i = counter(octets // step, 3)
        y = added(dot(down.layout, arrays, owner(experts, t, down) * hidden + column, i * step, step,
                      lambda i, k: h.index(t * tile + row, i * OCTET + k).load()), i)
        return out.index(t * tile + row, column).store(y).end(column, t, row).sink(
            arg=KernelInfo(f"tiles_{down.format}_{tiles}_{tile}_{width}_{hidden}", opts_to_apply=opts))
    return result(tiles * tile, hidden, like=h).custom_kernel(h, groups.experts, *down.arrays, fxn=kernel)[0]


def summed(parts: Tensor, groups: Groups) -> Tensor:
    """The sum of what a token's assignments add: parts (places, hidden) -> (tokens, hidden)."""
    (places, hidden), (tokens, used) = parts.shape, groups.places.shape
    opts = tuning.columns(parts.device, 0, hidden)

    def kernel(out: UOp, parts: UOp, mine: UOp) -> UOp:
        column, token = UOp.range(hidden, 0), UOp.range(tokens, 1)
        y = sum(parts.index(number(mine.index(token, UOp.const(n, dtypes.weakint)), places), column).load()
                for n in range(used))
        return out.index(token, column).store(y).end(column, token).sink(
            arg=KernelInfo(f"tiles_sum_{tokens}_{hidden}", opts_to_apply=opts))
    return result(tokens, hidden, like=parts).custom_kernel(parts, groups.places, fxn=kernel)[0]
