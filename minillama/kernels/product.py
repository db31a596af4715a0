"""Products with packed weights for a few tokens: each weight is read once and unpacked where it is used.

A row of weights meets the tokens octet by octet; quants are summed before their scale is applied. `linear` is the
plain product; `gated` is the first half of the chosen experts' SwiGLU networks, `shared_gated` that of the
expert that sees every token, `mixed` the chosen experts' second half, added up.
"""
from collections.abc import Callable

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama.kernels import tuning
from minillama.kernels.layouts import OCTET, Layout, in_pairs
from minillama.kernels.packed import Packed


def dot(layout: Layout, arrays: tuple[UOp, ...], row: UOp, first: UOp, step: int,
        value: Callable[[UOp, int], UOp], pairs: bool = False) -> UOp:
    """What the `step` octets from number `first` on add to the product of a row with a vector: an expression.

    `value(i, k)` is the vector's value at place k of octet i. `pairs`: quants of four bits are moved two at a time.
    """
    total = None
    for i in (first + j for j in range(step)):
        octet = layout.octet(*arrays, row, i)
        octet = in_pairs(arrays[0], row, i, octet) if pairs and octet.bits == 4 else octet
        part = octet.times([value(i, k) for k in range(OCTET)])
        total = part if total is None else total + part
    return total


def counter(size: int, number: int) -> UOp:
    """What a sum runs over, 0 .. size - 1; the optimizer wants no loop of one."""
    return UOp.range(size, number, AxisType.REDUCE) if size > 1 else UOp.const(0, dtypes.weakint)


def added(x: UOp, *over: UOp) -> UOp:
    """The sum of an expression over counters."""
    over = [i for i in over if i.op is Ops.RANGE]
    return x.reduce(*over, arg=Ops.ADD) if over else x


def number(x: UOp, below: int = 0) -> UOp:
    """A loaded integer, to index with. Where it is known to be from 0 to `below` - 1, it is kept within these bounds:
    then it needs no 64-bit arithmetic, and what lies side by side behind it is read in one go."""
    value = x.load()
    if below:
        value = value & (below - 1) if below & (below - 1) == 0 else value.maximum(0).minimum(below - 1)
    return value.cast(dtypes.weakint)


Column = tuple[Tensor, int]     # where a projection lies: a buffer (tokens, columns) and the first of its columns


def result(*shape: int, like: Tensor) -> Tensor:
    """A buffer for a kernel to fill."""
    return Tensor.empty(*shape, dtype=dtypes.float32, device=like.device)


# ---- x times a matrix ---------------------------------------------------------------------------------------------


def linear_twin(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows)."""
    y = x @ weight.values().T
    return y if residual is None else y + residual


def linear(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """As `linear_twin`. A bundle of threads computes some rows for all tokens: it reads their packed bytes once, x
    from the cache once for all of its rows, and writes one value a row and token."""
    tokens, octets, rows = x.shape[0], weight.columns // OCTET, weight.rows
    (step, opts), pairs = tuning.product(x.device, rows, octets, tokens), tuning.moves_pairs(x.device)
    extra = [] if residual is None else [residual]

    def kernel(out: UOp, x: UOp, *buffers: UOp) -> UOp:
        row, token, i = UOp.range(rows, 0), UOp.range(tokens, 1), counter(octets // step, 2)
        y = added(dot(weight.layout, buffers[len(extra):], row, i * step, step,
                      lambda i, k: x.index(token, i * OCTET + k).load(), pairs), i)
        y = y + buffers[0].index(token, row).load() if extra else y
        return out.index(token, row).store(y).end(row, token).sink(
            arg=KernelInfo(f"linear_{weight.format}_{tokens}_{rows}_{weight.columns}", opts_to_apply=opts))
    return result(tokens, rows, like=x).custom_kernel(x, *extra, *weight.arrays, fxn=kernel)[0]


# ---- experts ------------------------------------------------------------------------------------------------------


def gated_twin(x: Tensor, gate: Packed, up: Packed, ids: Tensor, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * share, of each chosen expert: (tokens, used, width).

    x (tokens, hidden); gate, up (experts, width, hidden); ids int32 and share (tokens, used).
    """
    def chosen(weight: Packed) -> Tensor:                                   # (tokens, used, width)
        return (weight.values()[ids] * x.reshape(x.shape[0], 1, 1, x.shape[1])).sum(-1)
    return chosen(gate).silu() * chosen(up) * share.unsqueeze(-1)


def gated(x: Tensor, gate: Packed, up: Packed, ids: Tensor, share: Tensor, logits: bool = False) -> Tensor:
    """As `gated_twin`; the expert's number is looked up inside, so that no expert is copied. A bundle of threads
    computes some rows of gate and up at once: it reads both packed, and x from the cache once for all of them.
    `logits`: `share` is still what shares are the softmax of, the largest first."""
    (tokens, used), (_, width, hidden) = ids.shape, gate.shape
    octets = hidden // OCTET
    step, opts = tuning.product(x.device, width, octets, 1, matrices=2, times=tokens * used)
    split, pairs = len(gate.arrays), tuning.moves_pairs(x.device)

    def kernel(out: UOp, x: UOp, ids: UOp, share: UOp, *arrays: UOp) -> UOp:
        row, token, place = UOp.range(width, 0), UOp.range(tokens, 1), UOp.range(used, 2)
        i = counter(octets // step, 3)
        at = number(ids.index(token, place), gate.shape[0]) * width + row

        def value(i: UOp, k: int) -> UOp:
            return x.index(token, i * OCTET + k).load()
        g, u = (added(dot(weight.layout, mine, at, i * step, step, value, pairs), i)
                for weight, mine in ((gate, arrays[:split]), (up, arrays[split:])))
        mine = share.index(token, place).load()
        if logits:
            most, *_ = every = [share.index(token, UOp.const(n, dtypes.weakint)).load() for n in range(used)]
            mine = (mine - most).exp() / sum((one - most).exp() for one in every)
        y = g.silu() * u * mine
        return out.index(token, place, row).store(y).end(row, token, place).sink(
            arg=KernelInfo(f"gated_{gate.format}_{up.format}_{tokens}_{used}_{width}_{hidden}", opts_to_apply=opts))
    return result(tokens, used, width, like=x).custom_kernel(x, ids, share, *gate.arrays, *up.arrays, fxn=kernel)[0]


def shared_gated_twin(x: Tensor, gate: Packed, up: Packed, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * sigmoid(share · x), of the expert that sees every token: (tokens, width).

    x (tokens, hidden); gate, up (width, hidden); share (hidden,).
    """
    return linear_twin(x, gate).silu() * linear_twin(x, up) * (x * share).sum(-1, keepdim=True).sigmoid()


def shared_gated(x: Tensor, gate: Packed, up: Packed, share: Tensor, router: Packed | None = None) -> list[Tensor]:
    """As `shared_gated_twin`; every bundle of threads computes the token's share anew, one row more among its own.
    Where the `router` (rows of gate, hidden) has a row for each of gate's, x times that, too: (tokens, rows)."""
    (tokens, hidden), width = x.shape, gate.rows
    octets, routing = hidden // OCTET, [] if router is None else list(router.arrays)
    split, both = len(gate.arrays), len(gate.arrays) + len(up.arrays)
    (step, opts), pairs = tuning.product(x.device, width, octets, tokens, matrices=2), tuning.moves_pairs(x.device)
    outs = [result(tokens, width, like=x) for _ in range(1 + len(routing))]

    def kernel(*given: UOp) -> UOp:
        (x, share, *arrays), logits = given[len(outs):], given[1:len(outs)]
        row, token, i = UOp.range(width, 0), UOp.range(tokens, 1), counter(octets // step, 2)

        def value(i: UOp, k: int) -> UOp:
            return x.index(token, i * OCTET + k).load()
        parts = (gate, arrays[:split]), (up, arrays[split:both]), (router, arrays[both:])
        g, u, *rest = (added(dot(weight.layout, mine, row, i * step, step, value, pairs), i)
                       for weight, mine in parts[:2 + len(logits)])
        s = added(sum(share.index((i * step + j) * OCTET + k).load() * value(i * step + j, k)
                      for j in range(step) for k in range(OCTET)), i)
        stores = [out.index(token, row).store(y)
                  for out, y in zip(given, [g.silu() * u * s.sigmoid(), *rest], strict=False)]
        name = f"{'routed_' if rest else ''}shared_{gate.format}_{up.format}_{tokens}_{width}_{hidden}"
        return UOp.group(*stores).end(row, token).sink(arg=KernelInfo(name, opts_to_apply=opts))
    return outs[0].custom_kernel(*outs[1:], x, share, *gate.arrays, *up.arrays, *routing, fxn=kernel)[:len(outs)]


def mixed_twin(routed: Tensor, down: Packed, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """The sum over chosen experts of down · routed, plus `residual`: (tokens, hidden).

    routed (tokens, used, width); down (experts, hidden, width); ids (tokens, used) int32; residual (tokens, hidden).
    """
    y = (down.values()[ids] * routed.unsqueeze(2)).sum((1, 3))
    return y if residual is None else y + residual


def mixed(routed: Tensor, down: Packed, ids: Tensor, residual: Tensor | None = None,
          shared: tuple[Tensor, Packed] | None = None) -> Tensor:
    """As `mixed_twin`: a bundle of threads goes through the same rows of all chosen experts, and writes their sum.
    `shared`: a vector (tokens, width) and a matrix (hidden, width) whose product is added. (Only where the sum over
    experts is `tuning.written_out`.) Quants are not moved in pairs: the compiler then had fewer loads under way, and
    an H200 took 7.5 µs instead of 5.6."""
    (tokens, used, width), hidden = routed.shape, down.shape[1]
    octets = width // OCTET
    step, opts = tuning.product(routed.device, hidden, octets, 1, outer=used)
    every, extra = octets // step, [] if residual is None else [residual]
    last = [] if shared is None else [shared[0], *shared[1].arrays]

    def kernel(out: UOp, routed: UOp, ids: UOp, *buffers: UOp) -> UOp:
        row, token = UOp.range(hidden, 0), UOp.range(tokens, 1)
        place, i = counter(used, 2), counter(every, 3)
        at = number(ids.index(token, place), down.shape[0]) * hidden + row
        arrays = buffers[len(extra):]
        y = dot(down.layout, arrays[:len(down.arrays)], at, i * step, step,
                lambda i, k: routed.index(token, place, i * OCTET + k).load())
        y = added(y, place, i)
        if last:
            vector, *matrix = arrays[len(down.arrays):]
            y = y + added(dot(shared[1].layout, tuple(matrix), row, i * step, step,
                              lambda i, k: vector.index(token, i * OCTET + k).load()), i)
        y = y + buffers[0].index(token, row).load() if extra else y
        return out.index(token, row).store(y).end(row, token).sink(
            arg=KernelInfo(f"mixed_{down.format}_{tokens}_{used}_{width}_{hidden}", opts_to_apply=opts))
    return result(tokens, hidden, like=routed).custom_kernel(
        routed, ids, *extra, *down.arrays, *last, fxn=kernel)[0]
