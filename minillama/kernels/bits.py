"""Numbers as bits: halves widened, quants put into a float's mantissa, small numbers packed into words and back.

What works on a UOp in a kernel works on whole tensors, too, where both know the same operators.
"""
from dataclasses import dataclass
from functools import cache

from tinygrad import Context, Device, Tensor, dtypes
from tinygrad.device import CompileError
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.uop.ops import Ops, UOp

from minillama.kernels import tuning

WORD, BITS, HALF, FLOAT = dtypes.uint32, dtypes.uint16, dtypes.half, dtypes.float32
EXPONENT, MANTISSA, LARGEST = 0x7c00, 0x03ff, 65504.0       # of a half
TOP, ONE = 23, 0x3F800000               # of a float32: the bits of its mantissa; the bits of 1.0
SUBNORMAL = 149                         # the float32 number whose bits are those of the integer 1 is 2^-149

# ---- in a kernel --------------------------------------------------------------------------------------------------


def half_to_float(bits: UOp | Tensor) -> UOp | Tensor:
    """The float32 value of a half given by its 16 bits (uint32), subnormal halves included; no infinities. Where
    halves lie as such, the device widens them.

    Bit operations, since some devices have no halves, and tinygrad's stand-in for them takes subnormals for zero.
    """
    if bits.dtype is HALF:
        return bits.cast(FLOAT)
    wide = (((bits & 0x7fff) << 13) + (112 << 23)).bitcast(dtypes.float32)      # the exponent's bias: 127 - 15 = 112
    tiny = (bits & MANTISSA).cast(dtypes.float32) * 2.0 ** -24
    size = (bits & EXPONENT).eq(0).where(tiny, wide)
    return (bits & 0x8000).eq(0).where(size, -size)


def moved(word: UOp, start: int, count: int, to: int, both: bool = False) -> UOp:
    """`count` bits of a word from bit `start` on, at bit `to` of an otherwise empty word; `both`: and those 16 bits
    above them."""
    shifted = word << (to - start) if to > start else word >> (start - to) if to < start else word
    return shifted & ((1 << count) - 1 << to) * (0x10001 if both else 1)


def above(bits: int, mantissa: UOp) -> UOp:
    """The float32 number from 2^bits to 2^(bits + 1) with this mantissa: where it is an integer of so many bits, put
    at the mantissa's top, 2^bits more than that."""
    return (mantissa | (ONE + (bits << TOP))).bitcast(dtypes.float32)


def times(x: UOp, factor: float) -> UOp:
    """x times a constant, made before all else. Left bare, tinygrad would pass the constant on to a larger product,
    and what it is to keep in range would have got lost; so a zero is added that only compilers see through."""
    return x * factor + ((x.bitcast(WORD) >> 1) & (1 << 31)).bitcast(FLOAT)


def apart(place: UOp) -> UOp:
    """The same place, so written that tinygrad does not join stores to neighbours: a zero is added that only compilers
    see through. A CPU's compiler finds vectors by itself, starting from what is stored: given vectors of four there,
    it makes none of eight (measured on an x86 with AVX-512: a product took 9.7 µs, not 7.5; with OpenCL on the same
    machine, whose compiler is the same, no difference was seen)."""
    bits = place.cast(WORD)
    return place + (bits & (bits ^ 0xffffffff)).cast(dtypes.weakint)


def as_halves(words: list[UOp], device: str) -> list[UOp]:
    """Words as pairs of halves, the lower one first. (CUDA's compiler would undo shifts by more shifts, but leaves a
    `half2` alone; tinygrad's emulator knows shifts only.)"""
    if tuning.is_cuda(device):
        both = "tg_bitcast<half2>((uint){0})."
        return [UOp(Ops.CUSTOMI, HALF, (word,), both + part) for word in words for part in "xy"]
    return [half.cast(BITS).bitcast(HALF) for word in words for half in (word, word >> 16)]


def two_halves(x: UOp, low: float, device: str) -> tuple[UOp, UOp]:
    """x, clamped to the range of halves, as two of them: x = first + second / low. (The first one is read back by an
    expression in CUDA C, since tinygrad folds a cast to half and back.)"""
    if tuning.is_cuda(device):
        x = UOp(Ops.CUSTOMI, FLOAT, (x,), f"fmaxf(fminf({{0}}, {LARGEST}f), -{LARGEST}f)")
        first = x.cast(HALF)
        return first, ((x - UOp(Ops.CUSTOMI, FLOAT, (first,), "__half2float({0})")) * low).cast(HALF)
    x = x.maximum(-LARGEST).minimum(LARGEST)
    first = x.cast(HALF)
    return first, ((x - half_to_float(first.bitcast(BITS).cast(WORD))) * low).cast(HALF)


@cache
def converts_halves(device: str) -> bool:
    """Whether products for a few tokens take the bits of halves for halves, on a CPU with an instruction that makes
    float32 numbers of them: any ARM, and x86 with F16C. Without it the compiler calls a function, slowly if tinygrad
    finds it at all. (Kernels for prompts move bits: some of them took three times as long with that instruction.)"""
    made = compiled(device, "float widened(__fp16* half) { return *half; }")
    return bool(made) and not any(function in made for function in (b"__gnu_h2f_ieee", b"__extendhfsf2"))


def compiled(device: str, source: str) -> bytes:
    """What a CPU's C compiler makes of a source: nothing where there is none, or it refuses."""
    if device.split(":")[0] != "CPU":
        return b""
    with Context(ALLOW_DEVICE_USAGE=1):         # also where a graph is being made, and nothing runs
        renderer = Device[device].renderer
        try:
            return renderer.compiler.compile_cached(source) if isinstance(renderer, ClangRenderer) else b""
        except CompileError:                    # one that knows no halves, for example
            return b""


@dataclass(frozen=True)
class AsHalves:
    """An array of 16-bit words that are to be read as halves."""
    words: UOp


def load(array: UOp | AsHalves, *index: UOp) -> UOp:
    """One item of an array, integers as uint32."""
    if isinstance(array, AsHalves):
        return array.words.index(*index).load().bitcast(HALF)
    value = array.index(*index).load()
    return value if value.dtype in dtypes.floats else value.cast(dtypes.uint32)


# ---- plain tensor forms -------------------------------------------------------------------------------------------


def span_bytes(blocks: Tensor, start: int, stop: int) -> Tensor:
    """Bytes start..stop of each block as uint32: (blocks, size) -> (blocks, stop - start)."""
    return blocks[:, start:stop].cast(dtypes.uint32)


def pack_bits(items: Tensor, bits: int, each: int = 0) -> Tensor:
    """Small numbers into words, `each` (default: as many as fit) to a word, the first in the lowest bits.

    items (blocks, n) uint32, each below 2^bits; returns (blocks, n / each).
    """
    each = each or 32 // bits
    shifts = Tensor.arange(each, dtype=dtypes.uint32) * bits
    return (items.reshape(items.shape[0], -1, each) << shifts).sum(-1, dtype=dtypes.uint32)


def unpack_bits(words: Tensor, bits: int) -> Tensor:
    """The reverse of `pack_bits`: (rows, n) -> (rows, n * 32 / bits)."""
    shifts = Tensor.arange(32 // bits, dtype=dtypes.uint32) * bits
    return ((words.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)).reshape(words.shape[0], -1)


def nibbles(packed: Tensor, width: int) -> Tensor:
    """Quants of a block in order, (blocks, 2n) uint32; of `width` bytes the file has the low halves first, then the
    high ones. packed (blocks, n) uint32."""
    shifts = Tensor([0, 4], dtype=dtypes.uint32, device=packed.device).reshape(1, 1, 2, 1)
    return ((packed.reshape(packed.shape[0], -1, 1, width) >> shifts) & 15).reshape(packed.shape[0], -1)


def half_values(stored: Tensor) -> Tensor:
    """The float32 values of halves, as they are stored."""
    return half_to_float(stored if stored.dtype is HALF else stored.cast(WORD))


def pair_values(stored: Tensor) -> tuple[Tensor, Tensor]:
    """The float32 values of pairs of halves: (rows, 2n) -> twice (rows, n)."""
    values = half_values(stored).reshape(stored.shape[0], -1, 2)
    return values[:, :, 0], values[:, :, 1]


def spread(items: Tensor, times: int) -> Tensor:
    """Each item of a row `times` over: (rows, n) -> (rows, n * times)."""
    return items.unsqueeze(-1).expand(*items.shape, times).reshape(items.shape[0], -1)
