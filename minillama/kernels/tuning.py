"""How kernels are spread over threads, by device: numbers found by measuring, apart from what the kernels compute.

A row's product is cut into *steps* of some octets. On a GPU, a subgroup of `lanes` threads shares `rows` rows and adds
up its parts (`sums.py`), so that each load of x serves all these rows; `groups` subgroups make a thread block. CPUs
have no lanes: there a few rows at once keep the vector units busy. A number that does not divide the problem gives way
to the next smaller power of two that does. Numbers that were not measured say so.
"""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache

from tinygrad import Device, dtypes
from tinygrad.codegen.opt import Opt, OptOps
from tinygrad.helpers import Context


@dataclass(frozen=True)
class Spread:
    """Octets a step, lanes a subgroup, rows a subgroup (without lanes: a thread, of each matrix), subgroups a thread
    block. Where there are lanes, `product` starts from these."""
    step: int
    lanes: int
    rows: int
    groups: int


FEW = 16            # tokens up to which a weight is unpacked where it is used; for a prompt's it is unpacked once
WRITTEN = 8         # turns of a loop over steps that lanes take at once, at most
GPU = Spread(step=2, lanes=32, rows=4, groups=4)       # measured on an H100; the others take its numbers untried
# CL (PoCL) and CPU: measured on a server's CPU of two cores (in most formats four octets share a scale)
SPREADS = {"CUDA": GPU, "METAL": GPU, "NV": GPU, "AMD": GPU, "CL": Spread(4, 1, 8, 1), "CPU": Spread(4, 1, 8, 1)}
SHARING = ("CUDA", "METAL", "NV", "AMD")


acting: dict[str, str] = {}     # device -> the backend that it stands for (`rendering.acting_as`)


def backend(device: str) -> str:
    name = device.split(":")[0]
    return acting.get(name, name)


def fitting(wish: int, size: int) -> int:
    """The largest power of two up to `wish` that divides `size`."""
    while size % wish:
        wish //= 2
    return wish


def spread_for(device: str) -> Spread:
    """The numbers for a device. The NULL device, which only counts, has no lanes."""
    return SPREADS.get(backend(device), SPREADS["CPU"])


def unrolled(device: str, terms: int) -> bool:
    """Whether lanes here do all terms of an outer sum in straight-line code."""
    return spread_for(device).lanes > 1 and terms <= 16


@dataclass(frozen=True)
class Tiling:
    """How a product is tiled: octets a step; without lanes the optimizer's options; else lanes a subgroup, rows that a
    subgroup does at once, subgroups a thread block, and steps of a lane that are unrolled."""
    step: int
    opts: tuple[Opt, ...] = ()
    lanes: int = 1
    each: int = 1
    groups: int = 1
    turns: int = 1


def product(device: str, rows: int, octets: int, tokens: int, matrices: int = 1, times: int = 1,
            outer: int = 1, plain: bool = False) -> Tiling:
    """The cut for so many rows and tokens, in a sum over `outer` terms; `times` over, for so many experts. Several
    `matrices` that are read at once leave a subgroup fewer rows of each. `plain`: they have no blocks, so that octets
    share no scale.

    Lanes do little work on much data, so their loads are issued all at once, in unrolled loops; otherwise each
    iteration would wait for the memory. (Measured on an H200.)
    """
    spread = spread_for(device)
    if spread.lanes == 1:
        each = fitting(spread.rows // (1 if tokens <= 2 else 2), rows)
        opts = [Opt(OptOps.UPCAST, 1, tokens)] if 1 < tokens <= 16 else []
        opts += [Opt(OptOps.UPCAST, 0, each)] if each > 1 else []
        return Tiling(1 if plain else fitting(spread.step, octets), tuple(opts))
    many, some = rows * times >= 8192, rows * times >= 2048
    step, lanes, each = spread.step, spread.lanes, spread.rows
    if outer > 1:
        step, lanes, each = 1, 2 * lanes, 2
    elif tokens > 2:
        step, each = 1 if many else step, each // matrices if some else 1
    elif some:                                          # two steps a lane
        lanes = min(4 * lanes, max(lanes, octets // step // 2))
        step = 1 if many and tokens > 1 else step
        each = 2 * each if many and tokens == 1 and matrices == 1 else each
    else:                                               # few rows: rather more threads than more rows in each
        step, lanes, each = 1, 2 * lanes, 1
    step = fitting(step, octets)
    lanes = fitting(lanes, octets // step)
    each = fitting(max(1, min(each, lanes // tokens)), rows)    # a lane goes on with one row and token at most
    turns, threads = octets // step // lanes, spread.lanes * spread.groups if some else 2 * spread.lanes
    at_once = fitting(WRITTEN // tokens, turns) if tokens <= 2 and unrolled(device, outer) else 1
    return Tiling(step, (), lanes, each, fitting(max(1, threads // lanes), rows // each), at_once)


@dataclass(frozen=True)
class WarpTiling:
    """How a product on tensor cores is tiled (`mma.py`): times 16 rows that a warp does at once, its steps of 128
    columns, warps that divide the columns among them, tokens that a block does at once, and how many such groups of
    warps a block has, which divide the terms of an outer sum among them."""
    each: int
    steps: int
    warps: int
    tokens: int
    groups: int = 1

    @property
    def every(self) -> int:
        """Warps of a block."""
        return self.warps * self.groups


GROUPS = 2              # of warps, where they add up several products (an H200: two tokens 4.9 instead of 5.6 µs, one
                        # no difference)
MOST_WARPS = 16         # of a block
SHARED = 48 * 1024      # bytes that the threads of a block can share
SHARED_ANYWHERE = 32 * 1024     # where Metal may be the device


def lanes_per_value(values: int, lanes: int) -> int:
    """How many lanes share the second stage of one value's reduction (`sums.lane_sums`): 1, or a power of two."""
    shares = 1
    while 2 * shares * values <= lanes and shares * shares < lanes:
        shares *= 2
    return shares


def shared_bytes(cut: WarpTiling, matrices: int, terms: int) -> int:
    """Shared memory of a block, at most, where each warp adds up so many terms: that of `mma.SharedTile` and
    `sums.lane_sums`."""
    units, lanes, values = cut.every * cut.steps * cut.tokens * terms, 4 * cut.every, 2 * cut.each * cut.tokens
    meeting = 8 * matrices * values * (lanes + lanes_per_value(matrices * values, lanes))
    return units * (512 + 2 * 64) + 128 + 4 * (meeting + cut.tokens * lanes)


def mma_tiling(device: str, rows: int, columns: int, tokens: int, matrices: int = 1, outer: int = 1,
          more: int = 0) -> WarpTiling | None:
    """The tiling for so many rows and tokens, in a sum over `outer` terms and some `more`; several `matrices` are read
    at once. None where tensor cores cannot, or better not, be used. (Measured on an H200, for one token and two.)"""
    steps = columns // 128
    if not uses_mma(device) or rows % 16 or columns % 128 or steps & steps - 1 or outer > 16:
        return None
    some = 1 if outer > 1 else fitting(4, max(1, steps // 2))
    for few in range(1 if outer > 1 else min(tokens, 4), 0, -1):
        each = 2 if rows >= 8192 and rows % 32 == 0 and few == 1 and matrices == 1 else 1
        for groups in (GROUPS, 1) if outer % GROUPS == 0 else (1,):
            cut = WarpTiling(each, some, steps // some, few, groups)
            if shared_bytes(cut, matrices, outer // groups + more) <= SHARED and 1 < cut.every <= MOST_WARPS:
                return cut if 2 * each * few <= 4 * cut.every else None
    return None


def uses_mma(device: str) -> bool:
    """Whether kernels written for tensor cores by hand are used (`mma.py`, `gemm.py`): for those that add up 16 terms,
    tried with CUDA alone."""
    return backend(device) == "CUDA" and has_tensor_cores(device, 16)


def is_cuda(device: str) -> bool:
    """Whether expressions in CUDA's own words may stand in a kernel: not in tinygrad's emulator."""
    return backend(device) == "CUDA" and not device.startswith("PYTHON")


def launches(device: str | None, early: bool, tokens: int = 1) -> AbstractContextManager:
    """Within it steps for so many tokens are captured in such a way that their kernels start early, if `early`: on
    CUDA before the kernel before them has ended (`overlap`), on a CPU without Python in between (`cpu_graph`), with
    OpenCL with little of it (`cl_graph`). Elsewhere tinygrad captures as it does.

    A prompt's kernels are long: overlapping, they only got in each other's way (an H200: 14 % slower).
    """
    device = device or Device.DEFAULT
    kind = device.split(":")[0]
    if not early or kind not in ("CPU", "CL", "CUDA"):
        return nullcontext()
    if kind == "CPU":       # each needs its device's library
        from minillama.kernels.cpu_graph import CPUGraph
        return captured_by(device, CPUGraph)
    if kind == "CL":
        from minillama.kernels.cl_graph import CLGraph
        return captured_by(device, CLGraph)
    from minillama.kernels import overlap
    return overlap.launches(device, tokens <= FEW)


@contextmanager
def captured_by(device: str, graph: type) -> Iterator[None]:
    """Within it each step that is captured on a device becomes one graph of that kind."""
    at = Device[device]
    before, at.graph = at.graph, graph
    try:
        with Context(JIT_BATCH_SIZE=0):
            yield
    finally:
        at.graph = before


def shares_memory(device: str) -> bool:
    """Whether kernels here let the threads of a block share memory and wait for each other. OpenCL could, but where it
    is tried its device is a CPU (PoCL), for which a block is a loop: so written, a delta step took four times as long.
    """
    return backend(device) in SHARING


def widens_halves(device: str) -> bool:
    """Whether a device makes the right float32 number of every half, subnormal ones included (measured: an H100). Not
    every CPU does (`bits.converts_halves`), nor does PoCL."""
    return backend(device) == "CUDA"


def multiplies_subnormals(device: str) -> bool:
    """Whether a device multiplies subnormal numbers, and as fast as others: then quants need not be moved. (Of those
    tried a CPU is slow with them; Metal's compiler may take them for zero.)"""
    return backend(device) == "CUDA"


def norms_inside(device: str, tokens: int) -> bool:
    """Whether products for a few tokens take the norm of what they read: where a kernel less counts for more than
    what each of them does over (measured on an H200: one and two tokens gain by it, three lose 4 %, four 2 %)."""
    return backend(device) == "CUDA" and tokens <= 2


def columns(device: str, axis: int, size: int) -> tuple[Opt, ...] | None:
    """Options for a loop over neighbouring columns: vectors of them on a CPU; elsewhere the optimizer chooses."""
    return (Opt(OptOps.UPCAST, axis, fitting(16, size)),) if backend(device) == "CPU" else None


def copying(device: str, size: int) -> tuple[Opt, ...] | None:
    """Options for a copy of so many values: on a GPU four neighbours a thread, 256 threads a block (measured on an
    H100); elsewhere the optimizer chooses."""
    if not shares_memory(device):
        return None
    each = fitting(4, size)
    return Opt(OptOps.UPCAST, 0, each), Opt(OptOps.LOCAL, 0, fitting(256, size // each))


@cache
def has_tensor_cores(device: str, terms: int = 0) -> bool:
    """Whether a device has units that multiply matrices of halves and add up floats (so many `terms` at once, if that
    is given); one that is not here, for which kernels are only rendered, has those of its backend."""
    if backend(device) not in ("CUDA", "NV", "METAL"):
        return False
    try:
        units = Device[device].renderer.tensor_cores
    except Exception:       # whatever a missing driver raises: it differs by backend
        return True
    return any((unit.dtype_in, unit.dtype_out) == (dtypes.half, dtypes.float) and terms in (0, unit.dims[2])
               for unit in units)


def multiplies_halves(device: str, rows: int) -> bool:
    """Whether a product with so many rows of weights can use such units."""
    return has_tensor_cores(device) and rows % 16 == 0


def depth(device: str) -> int:
    """Terms of a sum that such a unit adds at once. (On NVIDIA's from Ampere on; Turing's eight are not tried.)"""
    return 8 if backend(device) == "METAL" else 16


def skips_tiles(device: str) -> bool:
    """Whether a tile that nobody fills is passed over. Elsewhere that is not tried."""
    return backend(device) == "CUDA"


def tile_rows(device: str, assignments: int, experts: int) -> int:
    """Rows of a tile: more where experts have many tokens; tensor cores want eight at least."""
    return 16 if assignments >= 4 * experts else 8 if multiplies_halves(device, 16) else 4


def warp_tile(tokens: int, rows: int) -> tuple[int, int]:
    """Tokens, and times 16 rows, that a warp (32 threads) does at once where all rows of weights meet all tokens: more
    where warps enough for a whole GPU remain (measured on an H100)."""
    for size, each, warps in ((32, 4, 2048), (64, 2, 512), (16, 2, 512)):
        if tokens // size * (rows // (16 * each)) >= warps:
            return fitting(size, tokens), each
    return fitting(16, tokens), 1


def tensor_cores(device: str, size: int, rows: int, steps: int, tokens: int, each: int = 2, skips: bool = False,
                 ) -> tuple[Opt, ...]:
    """Options for a product on such units: rows of weights (axis 0) × tokens (axis `tokens`), summed over spans, over
    two halves, and over `steps` of 16 terms. A warp does `each` times 16 rows for `size` tokens; four warps make a
    block (measured on an H100). `skips`: how many spans there are, a kernel finds out.

    On other devices it is a plain loop: good for a test of what it computes.
    """
    if not multiplies_halves(device, rows):
        return ()
    deep = wide = depth(device)                                     # terms and rows of a unit
    short = (2 if steps > 1 else 1) + (deep < 16)                   # loops to write out
    opts = [Opt(OptOps.TC, 2 if steps > 1 else 1, (-1, 0, 1))] + [Opt(OptOps.UNROLL, int(not skips), 0)] * short
    opts += [Opt(OptOps.UPCAST, tokens, size // 8)] if size > 8 else []
    each = fitting(each, rows // wide)
    opts += [Opt(OptOps.UPCAST, 0, each)] if each > 1 else []
    blocks = fitting(4, rows // wide // each)
    return tuple(opts + ([Opt(OptOps.LOCAL, 0, blocks)] if blocks > 1 else []))


def tiles(device: str, columns: int, octets: int, tile: int) -> tuple[int, tuple[Opt, ...]]:
    """The same for columns (axis 0) × tiles (axis 1) × rows of a tile (axis 2), the rows all in one thread."""
    local = (Opt(OptOps.LOCAL, 0, fitting(64, columns)),) if shares_memory(device) else ()
    return fitting(spread_for(device).step, octets), (Opt(OptOps.UPCAST, 2, tile), *local)


def lanes(device: str, size: int) -> int:
    """Threads that share a sum over `size` terms: 1 where threads cannot share."""
    return fitting(32, size) if shares_memory(device) else 1


def ranks(device: str, tokens: int, experts: int) -> tuple[Opt, ...]:
    """Options for counting each expert's rank (axis 0) among all, for so many tokens: lanes share one count for a few
    tokens; for many, a thread counts alone, and what it reads its neighbours read, too (an H200: 38 µs, not 160)."""
    if tokens <= FEW or not shares_memory(device):
        return grouped(lanes(device, experts))
    opts = Opt(OptOps.LOCAL, 0, fitting(128, experts)), Opt(OptOps.UNROLL, 0, fitting(8, experts))
    return tuple(opt for opt in opts if opt.arg > 1)


def grouped(lanes: int) -> tuple[Opt, ...]:
    """Options that give a kernel's only sum that many lanes."""
    return (Opt(OptOps.GROUP, 0, lanes),) if lanes > 1 else ()
