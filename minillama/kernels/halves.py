"""Rows of x as pairs of halves, for products of many tokens on tensor cores (`gemm.py`).

A half holds 11 bits, and so a high half and what it leaves, a low one, hold 22: x = high + low / LOW. (Rounded to one
half, the reference models' routers choose other experts: logits off by 0.5. `mma.py` does the same for a few tokens.)
"""
from dataclasses import dataclass

from tinygrad import Tensor
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels import gemm_tuning, mma
from minillama.kernels.bits import FLOAT, HALF, WORD, two_halves
from minillama.kernels.layouts import OCTET, Layout, Pair
from minillama.kernels.mma import DOWN, LOW, SUBNORMAL
from minillama.kernels.packed import Packed

SPAN, STAGE = 32, 64        # columns: of which a row's high and low halves lie together; that travel together
HALVES = 2 * STAGE          # of a row and stage
SUMMED = 16                 # values of x whose sum is kept
PLAIN = 2.0 ** DOWN         # sums of products with plain values are so many times too small until they are done
QUANT = PLAIN * 2.0 ** SUBNORMAL        # and those with quants


def order(layout: Layout) -> list[Pair] | None:
    """The pairs in which an octet's values are multiplied: of quants as `mma.order`; plain values as they come."""
    if layout.block == 1:
        return [Pair(UOp.const(0, WORD), n, n + 1, 0) for n in range(0, OCTET, 2)]
    return mma.order(layout)


def fits(*weights: Packed) -> bool:
    """Whether these matrices can be multiplied so, and with the same x."""
    orders = [order(weight.layout) for weight in weights]
    whole = all(weight.columns % STAGE == 0 and weight.rows > 1 for weight in weights)
    return None not in orders and whole and len(
        {tuple((pair.first, pair.second, pair.power) for pair in pairs) for pairs in orders}) == 1


@dataclass(frozen=True)
class Halves:
    """Rows of x, for weights whose pairs of quants come in a certain order. `parts` (rows, 2 * columns) float16: of
    each span first the high halves, then the low ones, x = (high + low / LOW) * 2^(power + DOWN); `sums` (rows,
    columns / SUMMED) float32: what neighbours add up to, / QUANT."""
    parts: Tensor
    sums: Tensor

    @classmethod
    def empty(cls, rows: int, columns: int, device: str) -> "Halves":
        return cls(Tensor.empty(rows, 2 * columns, dtype=HALF, device=device),
                   Tensor.empty(rows, columns // SUMMED, dtype=FLOAT, device=device))


def stored(parts: UOp, sums: UOp, row: UOp, number: UOp, x: list[UOp], pairs: list[Pair], device: str) -> list[UOp]:
    """Stores of SUMMED values of a row, from SUMMED times `number` on: as halves, and their sum."""
    stores, span = [sums.index(row, number).store(sum(x[1:], x[0]) * (1 / QUANT))], number // 2
    for octet in range(SUMMED // OCTET):
        values = x[octet * OCTET:(octet + 1) * OCTET]
        halves = [two_halves(values[place] * 2.0 ** -(pair.power + DOWN), LOW, device)
                  for pair in pairs for place in (pair.first, pair.second)]
        place = span * (2 * SPAN) + ((number - span * 2) * 2 + octet) * OCTET
        stores += [parts.index(row, place + low * SPAN + n).store(half[low])
                   for low in range(2) for n, half in enumerate(halves)]
    return stores


def halves(x: Tensor, layout: Layout) -> Halves:
    """The rows of x (rows, columns), for weights of a layout."""
    (rows, columns), pairs, device = x.shape, order(layout), x.device

    def kernel(parts: UOp, sums: UOp, x: UOp) -> UOp:
        row, at = UOp.range(rows, 0), UOp.range(columns // SUMMED, 1)
        values = [x.index(row, at * SUMMED + k).load() for k in range(SUMMED)]
        return UOp.group(*stored(parts, sums, row, at, values, pairs, device)).end(row, at).sink(
            arg=KernelInfo(f"halves_{rows}_{columns}", opts_to_apply=gemm_tuning.over_rows(device, columns // SUMMED)))
    made = Halves.empty(rows, columns, device)
    return Halves(*made.parts.custom_kernel(made.sums, x.contiguous(), fxn=kernel)[:2])
