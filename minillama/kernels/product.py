"""Products with packed weights for a few tokens: each weight is read once and unpacked where it is used.

A row of weights meets the tokens octet by octet; quants are summed before their scale is applied. `linear` is the
plain product; `gated` is the first half of the chosen experts' SwiGLU networks, `shared_gated` that of the
expert that sees every token, `mixed` the chosen experts' second half, added up.
"""
from collections.abc import Callable

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from minillama.kernels import tuning
from minillama.kernels.block import const
from minillama.kernels.layouts import OCTET, Layout
from minillama.kernels.packed import Packed
from minillama.kernels.sums import Rows


def dot(layout: Layout, arrays: tuple[UOp, ...], row: UOp, first: UOp, step: int,
        value: Callable[[UOp, int], UOp], in_place: bool = False) -> UOp:
    """What the `step` octets from number `first` on add to the product of a row with a vector: an expression.

    `value(i, k)` is the vector's value at place k of octet i; `in_place`: see `Octet.times`.
    """
    total = None
    for i in (first + j for j in range(step)):
        part = layout.octet(*arrays, row, i).times([value(i, k) for k in range(OCTET)], in_place)
        total = part if total is None else total + part
    return total


def number(x: UOp, below: int = 0) -> UOp:
    """A loaded integer, to index with. Where it is known to be from 0 to `below` - 1, it is kept within these bounds:
    then it needs no 64-bit arithmetic, and what lies side by side behind it is read in one go."""
    value = x.load()
    if below:
        value = value & (below - 1) if below & (below - 1) == 0 else value.maximum(0).minimum(below - 1)
    return value.cast(dtypes.weakint)


def vector(x: UOp, *index: UOp) -> Callable[[UOp, int], UOp]:
    """The values of a vector in a kernel, by octet and place in it."""
    return lambda i, k: x.index(*index, i * OCTET + k).load()


def sums_along(weight: Packed, tokens: int, rows: int = 0, **more: int) -> Rows:
    """Sums along the rows of a matrix, or of `rows` of them."""
    octets, rows = weight.columns // OCTET, rows or weight.rows
    return Rows(weight.device, rows, octets, tokens, tuning.product(weight.device, rows, octets, tokens, **more))


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
    work, extra = sums_along(weight, x.shape[0]), [] if residual is None else [residual]
    in_place = tuning.multiplies_subnormals(x.device)

    def kernel(out: UOp, x: UOp, *buffers: UOp) -> UOp:
        def part(row: UOp, token: UOp, i: UOp, _: UOp) -> UOp:
            return dot(weight.layout, buffers[len(extra):], row, i, work.cut.step, vector(x, token), in_place)
        found = work.sums(part)
        y = found.totals[0] + (buffers[0].index(found.token, found.row).load() if extra else 0)
        return found.end(f"linear_{weight.format}_{work.tokens}_{weight.rows}_{weight.columns}",
                         out.index(found.token, found.place).store(y))
    return result(x.shape[0], weight.rows, like=x).custom_kernel(x, *extra, *weight.arrays, fxn=kernel)[0]


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
    work = sums_along(gate, 1, rows=width, matrices=2, times=tokens * used)
    split, in_place = len(gate.arrays), tuning.multiplies_subnormals(x.device)

    def kernel(out: UOp, x: UOp, ids: UOp, share: UOp, *arrays: UOp) -> UOp:
        token, place = UOp.range(tokens, 5), UOp.range(used, 6)
        first = number(ids.index(token, place), gate.shape[0]) * width

        def part(weight: Packed, mine: tuple[UOp, ...]):
            return lambda row, _, i, __: dot(weight.layout, mine, first + row, i, work.cut.step, vector(x, token),
                                             in_place)
        found = work.sums(part(gate, arrays[:split]), part(up, arrays[split:]))
        mine = share.index(token, place).load()
        if logits:
            most, *_ = every = [share.index(token, const(n)).load() for n in range(used)]
            mine = (mine - most).exp() / sum((one - most).exp() for one in every)
        g, u = found.totals
        return found.end(f"gated_{gate.format}_{up.format}_{tokens}_{used}_{width}_{hidden}",
                         out.index(token, place, found.place).store(g.silu() * u * mine), over=(token, place))
    return result(tokens, used, width, like=x).custom_kernel(x, ids, share, *gate.arrays, *up.arrays, fxn=kernel)[0]


def shared_gated_twin(x: Tensor, gate: Packed, up: Packed, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * sigmoid(share · x), of the expert that sees every token: (tokens, width).

    x (tokens, hidden); gate, up (width, hidden); share (hidden,).
    """
    return linear_twin(x, gate).silu() * linear_twin(x, up) * (x * share).sum(-1, keepdim=True).sigmoid()


def shared_gated(x: Tensor, gate: Packed, up: Packed, share: Tensor, router: Packed | None = None) -> list[Tensor]:
    """As `shared_gated_twin`; every bundle of threads computes the token's share anew, one row more among its own.
    Where the `router` (rows of gate, hidden) has a row for each of gate's, x times that, too: (tokens, rows)."""
    (tokens, hidden), routing = x.shape, [] if router is None else list(router.arrays)
    split, both = len(gate.arrays), len(gate.arrays) + len(up.arrays)
    work, in_place = sums_along(gate, tokens, matrices=2), tuning.multiplies_subnormals(x.device)
    outs = [result(tokens, gate.rows, like=x) for _ in range(1 + len(routing))]

    def kernel(*given: UOp) -> UOp:
        (x, share, *arrays), step = given[len(outs):], work.cut.step

        def part(weight: Packed, mine: tuple[UOp, ...]):
            return lambda row, token, i, _: dot(weight.layout, mine, row, i, step, vector(x, token), in_place)

        def of_share(_: UOp, token: UOp, i: UOp, __: UOp) -> UOp:
            return sum(share.index((i + j) * OCTET + k).load() * vector(x, token)(i + j, k)
                       for j in range(step) for k in range(OCTET))
        weights = (gate, arrays[:split]), (up, arrays[split:both]), (router, arrays[both:])
        found = work.sums(*(part(*weight) for weight in weights[:1 + len(outs)]), of_share)
        g, u, *rest, s = found.totals
        stores = [out.index(found.token, found.place).store(y)
                  for out, y in zip(given, [g.silu() * u * s.sigmoid(), *rest], strict=False)]
        return found.end(f"{'routed_' if rest else ''}shared_{gate.format}_{up.format}_{tokens}_{gate.rows}_{hidden}",
                         *stores)
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
    experts is `tuning.written_out`.)"""
    (tokens, used, width), hidden = routed.shape, down.shape[1]
    work = sums_along(down, 1, rows=hidden, outer=used)
    in_place, extra = tuning.multiplies_subnormals(routed.device), [] if residual is None else [residual]
    last = [] if shared is None else [shared[0], *shared[1].arrays]

    def kernel(out: UOp, routed: UOp, ids: UOp, *buffers: UOp) -> UOp:
        token, step = UOp.range(tokens, 5), work.cut.step
        arrays = buffers[len(extra):]

        def part(row: UOp, _: UOp, i: UOp, place: UOp) -> UOp:
            at = number(ids.index(token, place), down.shape[0]) * hidden + row
            return dot(down.layout, arrays[:len(down.arrays)], at, i, step, vector(routed, token, place), in_place)

        def once(row: UOp, _: UOp, i: UOp, __: UOp) -> UOp:
            x, *matrix = arrays[len(down.arrays):]
            return dot(shared[1].layout, tuple(matrix), row, i, step, vector(x, token), in_place)
        found = work.sums(part, outer=used, once=once if last else None)
        y = found.totals[0] + (buffers[0].index(token, found.row).load() if extra else 0)
        return found.end(f"mixed_{down.format}_{tokens}_{used}_{width}_{hidden}",
                         out.index(token, found.place).store(y), over=(token,))
    return result(tokens, hidden, like=routed).custom_kernel(
        routed, ids, *extra, *down.arrays, *last, fxn=kernel)[0]
