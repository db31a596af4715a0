"""Products with packed weights for a few tokens: each weight is read once and unpacked where it is used.

A row of weights meets the tokens octet by octet; quants are summed before their scale is applied (`sums.py`; on tensor
cores, where they can be used: `mma.py`). `linear` is the plain product; `gated` is the first half of the chosen
experts' SwiGLU networks, `shared_gated` that of the expert that sees every token, `mixed` the chosen experts' second
half, added up.
"""
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import UOp

from minillama.kernels import mma, tuning
from minillama.kernels.block import const
from minillama.kernels.layouts import OCTET
from minillama.kernels.mma import MmaRows
from minillama.kernels.packed import Packed
from minillama.kernels.sums import Factor, Rows, Vectors


def number(x: UOp, below: int = 0) -> UOp:
    """A loaded integer, to index with. Where it is known to be from 0 to `below` - 1, it is kept within these bounds:
    then it needs no 64-bit arithmetic, and what lies side by side behind it is read in one go."""
    value = x.load()
    if below:
        value = value & (below - 1) if below & (below - 1) == 0 else value.maximum(0).minimum(below - 1)
    return value.cast(dtypes.weakint)


@dataclass(frozen=True)
class Normed:
    """Rows x (tokens, dim), times `weight` (dim,), whose RMS norm is left to the kernels that read them: with the sums
    that they want they find that of the squares, and scale what they found. Saves a kernel, where that is what counts.
    """
    x: Tensor
    weight: Tensor
    eps: float

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def device(self) -> str:
        return self.x.device


def inputs(x: Tensor | Normed) -> list[Tensor]:
    """What a kernel must be given for `vectors`."""
    return [x.x, x.weight] if isinstance(x, Normed) else [x]


def vectors(x: Tensor | Normed, given: tuple[UOp, ...], at: Callable[[UOp, UOp], tuple[UOp, ...]]) -> Vectors:
    """How a kernel that is `given` its `inputs` reads x: at(token, term) is the index of a row."""
    def plain(token: UOp, term: UOp, i: UOp, k: int) -> UOp:
        return given[0].index(*at(token, term), i * OCTET + k).load()
    if not isinstance(x, Normed):
        return Vectors(plain)
    return Vectors(lambda token, term, i, k: plain(token, term, i, k) * given[1].index(i * OCTET + k).load(), plain,
                   x.eps)


def sums_along(*weights: Packed, tokens: int, rows: int = 0, times: int = 1, outer: int = 1,
               besides: tuple[Packed, ...] = ()) -> Rows | MmaRows:
    """Sums along the rows of matrices that are read at once, or along `rows` of them; `besides`: others that are read,
    too. On tensor cores, where they can be used."""
    first, matrices = weights[0], len(weights)
    rows = rows or first.rows
    cut = tuning.mma_tiling(first.device, rows, first.columns, tokens, matrices, outer, len(besides))
    if cut and mma.fits(*(weight.layout for weight in weights + besides)):
        return MmaRows(first.device, rows, first.columns, tokens, cut)
    octets = first.columns // OCTET
    return Rows(first.device, rows, octets, tokens,
                tuning.product(first.device, rows, octets, tokens, matrices, times, outer, first.layout.block == 1))


Column = tuple[Tensor, int]     # where a projection lies: a buffer (tokens, columns) and the first of its columns


def result(*shape: int, like: Tensor) -> Tensor:
    """A buffer for a kernel to fill."""
    return Tensor.empty(*shape, dtype=dtypes.float32, device=like.device)


# ---- x times a matrix ---------------------------------------------------------------------------------------------


def linear_twin(x: Tensor, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows)."""
    y = x @ weight.values().T
    return y if residual is None else y + residual


def linear(x: Tensor | Normed, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """As `linear_twin`. A subgroup of threads computes some rows for all tokens: it reads their packed bytes once, x
    from the cache once for all of its rows, and writes one value a row and token."""
    work, given = sums_along(weight, tokens=x.shape[0]), inputs(x)
    extra = [] if residual is None else [residual]

    def kernel(out: UOp, *buffers: UOp) -> UOp:
        xs, added, arrays = buffers[:len(given)], buffers[len(given):][:len(extra)], buffers[len(given) + len(extra):]
        found = work.sums(Factor(weight.layout, arrays, lambda row, _: row, vectors(x, xs, lambda t, _: (t,))),
                          prefetch=lambda t, row: [one.index(t, row).load() for one in added])
        return found.end(f"linear_{weight.format}_{work.tokens}_{weight.rows}_{weight.columns}",
                         out.index(found.token, found.place).store(sum(found.prefetched, found.totals[0])))
    return result(x.shape[0], weight.rows, like=given[0]).custom_kernel(
        *given, *extra, *weight.arrays, fxn=kernel)[0]


# ---- experts ------------------------------------------------------------------------------------------------------


def gated_twin(x: Tensor, gate: Packed, up: Packed, ids: Tensor, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * share, of each chosen expert: (tokens, used, width).

    x (tokens, hidden); gate, up (experts, width, hidden); ids int32 and share (tokens, used).
    """
    def chosen(weight: Packed) -> Tensor:                                   # (tokens, used, width)
        return (weight.values()[ids] * x.reshape(x.shape[0], 1, 1, x.shape[1])).sum(-1)
    return chosen(gate).silu() * chosen(up) * share.unsqueeze(-1)


def gated(x: Tensor | Normed, gate: Packed, up: Packed, ids: Tensor, share: Tensor, logits: bool = False) -> Tensor:
    """As `gated_twin`; the expert's number is looked up inside, so that no expert is copied. A subgroup of threads
    computes some rows of gate and up at once: it reads both packed, and x from the cache once for all of them.
    `logits`: `share` is still what shares are the softmax of, the largest first."""
    (tokens, used), (_, width, hidden), given = ids.shape, gate.shape, inputs(x)
    work = sums_along(gate, up, tokens=1, rows=width, times=tokens * used)

    def kernel(out: UOp, ids: UOp, share: UOp, *buffers: UOp) -> UOp:
        token, place = UOp.range(tokens, 5), UOp.range(used, 6)
        first = number(ids.index(token, place), gate.shape[0]) * width
        xs, arrays = vectors(x, buffers, lambda *_: (token,)), buffers[len(given):]
        both = (gate, arrays[:len(gate.arrays)]), (up, arrays[len(gate.arrays):])
        places = [const(n) for n in range(used)] if logits else []
        found = work.sums(*(Factor(weight.layout, mine, lambda row, _: first + row, xs) for weight, mine in both),
                          prefetch=lambda *_: [share.index(token, n).load() for n in [place, *places]])
        mine, *every = found.prefetched
        if logits:
            mine = (mine - every[0]).exp() / sum((one - every[0]).exp() for one in every)
        g, u = found.totals
        return found.end(f"gated_{gate.format}_{up.format}_{tokens}_{used}_{width}_{hidden}",
                         out.index(token, place, found.place).store(g.silu() * u * mine), over=(token, place))
    return result(tokens, used, width, like=ids).custom_kernel(
        ids, share, *given, *gate.arrays, *up.arrays, fxn=kernel)[0]


def shared_gated_twin(x: Tensor, gate: Packed, up: Packed, share: Tensor) -> Tensor:
    """silu(gate x) * (up x) * sigmoid(share · x), of the expert that sees every token: (tokens, width).

    x (tokens, hidden); gate, up (width, hidden); share (hidden,).
    """
    return linear_twin(x, gate).silu() * linear_twin(x, up) * (x * share).sum(-1, keepdim=True).sigmoid()


def shared_gated(x: Tensor | Normed, gate: Packed, up: Packed, share: Tensor, router: Packed | None = None,
                 ) -> list[Tensor]:
    """As `shared_gated_twin`; every subgroup of threads computes the token's share anew, one row more among its own.
    Where the `router` (rows of gate, hidden) has a row for each of gate's, x times that, too: (tokens, rows). Where a
    norm is still to be taken, the last result is what it gives, (tokens, hidden): each row writes some of it."""
    (tokens, hidden), weights, given = x.shape, [gate, up, *([] if router is None else [router])], inputs(x)
    octets = hidden // OCTET        # one of them is no matrix: not for tensor cores
    work = Rows(x.device, gate.rows, octets, tokens,
                tuning.product(x.device, gate.rows, octets, tokens, 2, plain=gate.layout.block == 1))
    outs = [result(tokens, gate.rows, like=share) for _ in weights[1:]]
    columns = hidden // gate.rows if isinstance(x, Normed) and hidden % gate.rows == 0 else 0   # that a row writes
    outs += [result(tokens, hidden, like=share)] if columns else []

    def kernel(*buffers: UOp) -> UOp:
        (share, *rest), factors = buffers[len(outs):], []
        given_x, rest = rest[:len(given)], rest[len(given):]
        xs = vectors(x, given_x, lambda t, _: (t,))
        for weight in weights:
            mine, rest = rest[:len(weight.arrays)], rest[len(weight.arrays):]
            factors.append(Factor(weight.layout, tuple(mine), lambda row, _: row, xs))

        def of_share(_: UOp, token: UOp, first: UOp, term: UOp) -> UOp:
            return sum(share.index((first + j) * OCTET + k).load() * xs.value(token, term, first + j, k)
                       for j in range(work.cut.step) for k in range(OCTET))
        found = work.sums(*factors, of_share)
        g, u, *others, s = found.totals
        stores = [out.index(found.token, found.place).store(y)
                  for out, y in zip(buffers, [g.silu() * u * s.sigmoid(), *others], strict=False)]
        for n in range(columns):
            value = given_x[0].index(found.token, found.row * columns + n).load() * given_x[1].index(
                found.row * columns + n).load()
            stores.append(buffers[len(outs) - 1].index(found.token, found.place * columns + n).store(
                value * found.scale))
        name = f"{'routed_' if others else ''}shared_{gate.format}_{up.format}_{tokens}_{gate.rows}_{hidden}"
        return found.end(name, *stores)
    arrays = [array for weight in weights for array in weight.arrays]
    return outs[0].custom_kernel(*outs[1:], share, *given, *arrays, fxn=kernel)[:len(outs)]


def mixed_twin(routed: Tensor, down: Packed, ids: Tensor, residual: Tensor | None = None) -> Tensor:
    """The sum over chosen experts of down · routed, plus `residual`: (tokens, hidden).

    routed (tokens, used, width); down (experts, hidden, width); ids (tokens, used) int32; residual (tokens, hidden).
    """
    y = (down.values()[ids] * routed.unsqueeze(2)).sum((1, 3))
    return y if residual is None else y + residual


def mixed(routed: Tensor, down: Packed, ids: Tensor, residual: Tensor | None = None,
          shared: tuple[Tensor, Packed] | None = None) -> Tensor:
    """As `mixed_twin`: a subgroup of threads goes through the same rows of all chosen experts, and writes their sum.
    `shared`: a vector (tokens, width) and a matrix (hidden, width) whose product is added. (Only where the sum over
    experts is `tuning.unrolled`.)"""
    (tokens, used, width), hidden = routed.shape, down.shape[1]
    extra, last = [] if residual is None else [residual], [] if shared is None else [shared[0], *shared[1].arrays]
    work = sums_along(down, tokens=1, rows=hidden, outer=used, besides=() if shared is None else (shared[1],))

    def kernel(out: UOp, routed: UOp, ids: UOp, *buffers: UOp) -> UOp:
        token, split = UOp.range(tokens, 5), len(extra) + len(down.arrays)
        each = Factor(down.layout, buffers[len(extra):split], lambda row, place: number(
            ids.index(token, place), down.shape[0]) * hidden + row,
            vectors(routed, (routed,), lambda _, place: (token, place)))
        once = Factor(shared[1].layout, buffers[split + 1:], lambda row, _: row, vectors(
            shared[0], buffers[split:], lambda *_: (token,))) if shared else None
        found = work.sums(each, outer=used, once=once, prefetch=lambda _, row: [
            one.index(token, row).load() for one in buffers[:len(extra)]])
        return found.end(f"mixed_{down.format}_{tokens}_{used}_{width}_{hidden}",
                         out.index(token, found.place).store(sum(found.prefetched, found.totals[0])), over=(token,))
    return result(tokens, hidden, like=routed).custom_kernel(
        routed, ids, *extra, *down.arrays, *last, fxn=kernel)[0]
