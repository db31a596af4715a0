"""Products for many tokens on units that multiply small matrices of halves ("tensor cores"), far faster than a float32
at a time. Packed weights are unpacked on their way into such a unit and are never written out.

Halves hold 11 bits. What is small and integer, as a quant is, they hold exactly, and so it is the quants that go in;
the scale comes after the sum over the values that share it. The other factor, x, goes in as two halves, one for its
upper bits and one for what they leave.

tinygrad's optimizer makes the loops here. Metal takes these kernels; CUDA those of `gemm.py`, which move what they
need by hand, but for matrices whose columns do not divide into stages.
"""
from collections.abc import Callable
from dataclasses import dataclass

from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import AxisType, KernelInfo, Ops, UOp

from minillama import program_cache
from minillama.kernels import tuning
from minillama.kernels.bits import LARGEST
from minillama.kernels.layouts import OCTET
from minillama.kernels.packed import Packed
from minillama.kernels.product import number, result

program_cache.install()     # which counts `tiles`
SPAN = 16                   # values of x whose sum is kept: the fewest that share a scale
DEEP = 16                   # terms of a sum that one unit adds at once, or two of another kind
HALF_MASK = 0xFFFFE000      # the bits of a float32 that a half has too
LEAST = 2.0 ** -14          # of the halves that hold 11 bits
LOW = 2048.0                # lifts what 11 bits leave to where halves are precise


@dataclass(frozen=True)
class Halves:
    """Rows of x as pairs of halves, x = high + low / LOW, right to 21 bits (below 2^-14, to 11); what is beyond the
    largest half is taken for that. `parts` (rows, 2, columns) float16, the high ones first; and what neighbours add up
    to, `sums` (rows, columns / SPAN) float32."""
    parts: Tensor
    sums: Tensor


def split(rows: int, columns: int, inputs: tuple[Tensor, ...], value: Callable[..., UOp]) -> Halves:
    """Values as halves: `value(row, column, *inputs)` is each one's expression in a kernel."""
    def kernel(parts: UOp, sums: UOp, *inputs: UOp) -> UOp:
        row, span = UOp.range(rows, 0), UOp.range(columns // SPAN, 1)
        values = [value(row, span * SPAN + k, *inputs) for k in range(SPAN)]
        values = [v.maximum(-LARGEST).minimum(LARGEST) for v in values]
        stores = [sums.index(row, span).store(sum(values[1:], values[0]))]
        for k, v in enumerate(values):
            high = (v.bitcast(dtypes.uint32) & HALF_MASK).bitcast(dtypes.float32)
            high = (v.abs() < LEAST).where(UOp.const(0.0), high)            # subnormal, on some devices zero
            for n, part in enumerate((high, (v - high) * LOW)):
                stores.append(parts.index(row, UOp.const(n, dtypes.weakint), span * SPAN + k).store(
                    part.cast(dtypes.half)))
        return UOp.group(*stores).end(row, span).sink(arg=KernelInfo(f"split_{rows}_{columns}"))
    device = inputs[0].device
    parts = Tensor.empty(rows, 2, columns, dtype=dtypes.half, device=device)
    sums = Tensor.empty(rows, columns // SPAN, dtype=dtypes.float32, device=device)
    return Halves(*parts.custom_kernel(sums, *inputs, fxn=kernel)[:2])


def halves(x: Tensor) -> Halves:
    """The rows of x (rows, columns)."""
    return split(*x.shape, (x.contiguous(),), lambda row, column, x: x.index(row, column).load())


def fours(x: Tensor, second: bool = False) -> Tensor:
    """A factor of a product, the first or the `second`: x (..., k), values around 1, as four halves each, (..., 4 * k)
    float16. Of a value 21 bits count, but none below 2^-25. Side by side lie the high and low halves, so that a sum
    over the products of two such rows adds up all four products of each pair. Plain tensor code, and the optimizer
    puts the product on the units; on a device without any, each product of two halves would be rounded to a half.
    """
    x = x.clip(-LARGEST, LARGEST)
    high = (x.bitcast(dtypes.uint32) & HALF_MASK).bitcast(dtypes.float32)
    high, low = high.half(), (x - high).half()
    order = (high, high, low, low) if second else (high, low, high, low)
    return Tensor.stack(*order, dim=-1).reshape(*x.shape[:-1], 4 * x.shape[-1]).contiguous()


def multiplied(first: Tensor, second: Tensor) -> Tensor:
    """The product of `fours`: first (..., m, 4 * k), second (..., n, 4 * k), transposed: (..., m, n) float32."""
    return first.matmul(second.transpose(-1, -2), dtype=dtypes.float32)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., m, k) times b (..., n, k) transposed, by `fours`: (..., m, n) float32."""
    return multiplied(fours(a), fours(b, second=True))


def long_product(a: Tensor, b: Tensor) -> Tensor:
    """The same of matrices (m, k) and (n, k), its sums cut into pieces: a unit cuts off what it adds up, and
    small results leave most of a GPU idle."""
    size = a.shape[1] // tuning.fitting(8, a.shape[1] // DEEP)
    return product(*(x.reshape(x.shape[0], -1, size).permute(1, 0, 2) for x in (a, b))).contiguous().sum(0)


def fits(weight: Packed) -> bool:
    """Whether a weight's quants are exact as halves, and can be had in the portions that the units want."""
    span = weight.layout.span
    return span > 0 and weight.columns % span == 0 and weight.columns > span


def _pick(items: list[UOp], k: UOp) -> UOp:
    """items[k], where k is a number once all short loops are written out."""
    out = items[-1]
    for n in range(len(items) - 2, -1, -1):
        out = k.eq(n).where(items[n], out)
    return out


def operands(x: Halves, weight: Packed) -> list[Tensor]:
    """What a kernel must be given for `dot`: x's sums only where there are scales, and then the weight's arrays."""
    return [x.parts, *([x.sums] if weight.layout.block > 1 else []), *weight.arrays]


def dot(weight: Packed, given: tuple[UOp, ...], at: UOp, token: UOp, spans: UOp | int, deep: int) -> UOp:
    """A weight's row `at` times the row `token` of x, in so many `spans` of values that share a scale: an expression.
    given: `operands` in the kernel.

    A unit adds up `deep` products, whichever they are; of 16 in a row, `k`, each of four threads has four. Which
    values of x these numbers stand for is chosen so that a thread finds its own side by side: four, or eight in two
    steps.
    """
    parts, *arrays = given
    sums = arrays.pop(0) if weight.layout.block > 1 else None
    span = weight.layout.span
    steps = span // DEEP
    block = UOp.range(spans, 3, AxisType.REDUCE)
    part, k = UOp.range(2, 4, AxisType.REDUCE), UOp.range(DEEP, 6, AxisType.REDUCE)
    low, thread, high = k - (k // 2) * 2, (k // 2) % 4, k // 8              # `k % 2` would split the loop over k
    if steps > 1:                                                           # a thread has an octet
        step = UOp.range(steps, 5, AxisType.REDUCE)
        half, place = (step, high * 2 + low) if deep == DEEP else (low, step * 2 + high)
        over, i, column = (step, k), block * 4 + thread, thread * OCTET + half * 4 + place
    else:                                                                   # two threads share one
        half, place = thread % 2, high * 2 + low if deep == DEEP else low * 2 + high
        over, i, column = (k,), block * 2 + thread // 2, thread * 4 + place
    quants = weight.layout.octet(*arrays, at, i).quants
    quant = half.eq(0).where(_pick(quants[:4], place), _pick(quants[4:], place))
    product = quant.cast(dtypes.half) * parts.index(token, part, block * span + column).load()
    total = product.cast(dtypes.float32).reduce(*over, arg=Ops.ADD)
    total = (total * part.eq(0).where(UOp.const(1.0), UOp.const(1 / LOW))).reduce(part, arg=Ops.ADD)
    if sums is not None:
        first = weight.layout.octet(*arrays, at, block * (span // OCTET))   # its scale is that of the span
        total = first.scaled(total, sum(sums.index(token, block * steps + n).load() for n in range(steps)))
    return total.reduce(block, arg=Ops.ADD)


def linear(x: Halves, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """x (tokens, columns) times a matrix (rows, columns) transposed, plus `residual`: (tokens, rows)."""
    tokens, rows, extra = x.parts.shape[0], weight.rows, [] if residual is None else [residual]
    size, each = tuning.warp_tile(tokens, rows)
    opts = tuning.tensor_cores(x.parts.device, size, rows, weight.layout.span // DEEP, tokens=1, each=each)

    def kernel(out: UOp, *buffers: UOp) -> UOp:
        row, token = UOp.range(rows, 0), UOp.range(tokens, 1)
        y = dot(weight, buffers[len(extra):], row, token, weight.columns // weight.layout.span,
                tuning.depth(x.parts.device))
        y = y + buffers[0].index(token, row).load() if extra else y
        return out.index(token, row).store(y).end(row, token).sink(
            arg=KernelInfo(f"halves_{weight.format}_{tokens}_{rows}_{weight.columns}", opts_to_apply=opts))
    return result(tokens, rows, like=x.parts).custom_kernel(*extra, *operands(x, weight), fxn=kernel)[0]


def tiles(x: Halves, weight: Packed, experts: Tensor, tile: int, rows: Tensor | None = None, used: int = 1) -> Tensor:
    """Tiles of x's rows, each times one expert's matrix of weight (experts, rows, columns): (places, rows).

    experts (tiles,) int32, below 0 for a tile that nobody fills: its result means nothing, and on CUDA it takes next
    to no time. rows (places,) int32: the assignment in each place, of which x has one row for `used`; None: x lies in
    the places' order.
    """
    count, width, all_tokens, device = experts.shape[0], weight.shape[1], x.parts.shape[0], x.parts.device
    given, spans = [] if rows is None else [rows], weight.columns // weight.layout.span
    skips = tuning.skips_tiles(device)
    opts = tuning.tensor_cores(device, tile, width, weight.layout.span // DEEP, tokens=2, skips=skips)
    name = f"halves_tiles_{weight.format}_{count}_{tile}_{width}_{weight.columns}"

    def kernel(out: UOp, experts: UOp, *buffers: UOp) -> UOp:
        row, t, place = UOp.range(width, 0), UOp.range(count, 1), UOp.range(tile, 2)
        at = number(experts.index(t), weight.shape[0]) * width + row
        token = number(buffers[0].index(t * tile + place), all_tokens * used) // used if given else t * tile + place
        loops = (experts.index(t).load() < 0).where(*(UOp.const(n, dtypes.weakint) for n in (0, spans)))
        y = dot(weight, buffers[len(given):], at, token, loops if skips else spans, tuning.depth(device))
        return out.index(t * tile + place, row).store(y).end(row, t, place).sink(
            arg=KernelInfo(name, opts_to_apply=opts))
    return result(count * tile, width, like=x.parts).custom_kernel(
        experts, *given, *operands(x, weight), fxn=kernel)[0]
