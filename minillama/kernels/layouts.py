"""Packed weights on the device: the file's bits in aligned 32-bit words, eight values (an *octet*) at a time.

A block of a GGUF file holds its scale between its quants, at addresses that no GPU likes to read, and its nibbles in
an order that suited a CPU's vector instructions. Here the same bits lie apart and in sequence: quants (the low 4 bits
of 8 values a word, or 4 values of 8 bits), the bits above them, scales. A tensor takes on the device what it takes in
the file, save that the six-bit numbers of Q4_K and Q5_K get a byte each there (2.8 % and 2.3 % more): found with a
shift, not put together from two places. Scales stay halves; where a device cannot be trusted with those they lie as
their 16 bits, which kernels widen by hand (or, on many CPUs, read as halves). Three forms of each layout stand
together:

- `repack`, plain tensor code: rows of a file's blocks -> the arrays;
- `values`, plain tensor code, the twin: the arrays -> float values;
- `octet`, in a kernel: the eight quants of octet i of a row, as floats, and what makes values of them.

Block formats: llama.cpp, ggml/src/ggml-common.h.
"""
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType
from tinygrad.uop.ops import UOp

from minillama.kernels import tuning
from minillama.kernels.bits import (
    BITS,
    FLOAT,
    HALF,
    SUBNORMAL,
    TOP,
    WORD,
    above,
    half_to_float,
    half_values,
    load,
    moved,
    nibbles,
    pack_bits,
    pair_values,
    span_bytes,
    spread,
    times,
    unpack_bits,
)

OCTET = 8
LOWERED = 80        # products of subnormal numbers and values made large are 2^80 times too small: far from all limits
TOP_OF_HALF = 10    # the bits of a half's mantissa
HIGH = 12           # by which bits are moved down that lie where a float32 number has its exponent


def total(pairs: Iterable[tuple[UOp, UOp]]) -> UOp:
    """The sum of products of pairs."""
    return reduce(operator.add, (a * b for a, b in pairs))


@dataclass(frozen=True)
class Field:
    """Where some bits of a quant lie: `count` of them in a word, from bit `start` on; `weight`: which of the quant's
    bits is their first."""
    word: UOp
    start: int
    count: int
    weight: int = 0

    def at(self, place: int) -> UOp:
        """These bits from bit `place` of an otherwise empty word on."""
        return moved(self.word, self.start, self.count, place + self.weight)

    def in_place(self, x: UOp) -> tuple[UOp, UOp]:
        """Two factors whose product is bits * 2^weight * x * 2^-LOWERED. The first is the masked word, read as a
        (subnormal) float32 number; the second is x, scaled up to make good for that."""
        low = 0 if self.start + self.count <= TOP else HIGH         # bits of the exponent come down first
        place = self.start - low
        return (moved(self.word, self.start, self.count, place).bitcast(FLOAT),
                times(x, 2.0 ** (SUBNORMAL - LOWERED - place + self.weight)))


@dataclass(frozen=True)
class Pair:
    """Two quants of an octet as the subnormal halves of a word, each quant * 2^(power - 24)."""
    word: UOp
    first: int      # their places
    second: int
    power: int


@dataclass(frozen=True)
class Octet:
    """Eight quants of a row in a kernel, each made of fields that have `bits` bits together; or eight `plain` values.

    value = (n - bias) * scale + offset of a quant n. No n is converted from an integer: as one of `quants` it comes as
    the float32 number 2^bits + n, whose mantissa holds its bits.
    """
    fields: list[list[Field]]
    bits: int = 0
    bias: int = 0
    scale: UOp | None = None
    offset: UOp | None = None
    plain: list[UOp] | None = None

    @property
    def quants(self) -> list[UOp]:
        """2^bits + n, of each; or the values."""
        return self.plain or [above(self.bits, reduce(operator.or_, (f.at(TOP - self.bits) for f in fields)))
                              for fields in self.fields]

    def times(self, x: list[UOp], in_place: bool = False) -> UOp:
        """The dot product of the octet's values with eight others: one multiplication and addition a value, and the
        sum of x (the same for all rows) to take the bias away again. `in_place`: one a field, and no field is
        moved."""
        if self.plain or not in_place:
            return self.scaled(total(zip(self.quants, x, strict=True)), reduce(operator.add, x))
        y = total(field.in_place(v) for fields, v in zip(self.fields, x, strict=True) for field in fields)
        return self.scaled(y * 2.0 ** LOWERED, reduce(operator.add, x), self.bias)

    def scaled(self, total: UOp, sum_of_x: UOp, excess: int | None = None) -> UOp:
        """The dot product of the true values with x, from that of numbers which are each `excess` larger than n - bias
        (by default those of `quants`)."""
        if self.plain:
            return total
        excess = self.bias + (1 << self.bits) if excess is None else excess
        y = (total - sum_of_x * float(excess) if excess else total) * self.scale
        return y if self.offset is None else y + sum_of_x * self.offset

    def pairs(self) -> list[Pair]:
        """The quants in pairs, where they lie: 16 bits apart in a word."""
        found = []
        for place, (low, *more) in enumerate(self.fields):
            if low.start >= 16:
                continue
            other = next(n for n, (high, *_) in enumerate(self.fields)
                         if high.word is low.word and high.start == low.start + 16)
            down = 8 if low.start + self.bits > TOP_OF_HALF else 0      # else they would reach a half's exponent
            power = low.start - down
            word = moved(low.word, low.start, low.count, power, both=True)
            for high in more:       # further bits, of all quants side by side: the upper four's go to the upper half
                size = 4 * high.count
                every = high.word & ((1 << 2 * size) - 1)
                apart = every | (every << 16 - size)
                word = word | moved(apart, high.start, high.count, power + high.weight, both=True)
            found.append(Pair(word, place, other, power))
        return found

    def values(self) -> list[UOp]:
        """The values, each by itself."""
        return self.plain or [self.scaled(q, UOp.const(1.0)) for q in self.quants]


@dataclass(frozen=True)
class Part:
    """One array of a layout: an item of type `dtype` for every `span` values of a row, or several (`items`)."""
    dtype: DType
    span: int
    items: int = 1

    def on(self, device: str) -> DType:
        """The type that items have on a device."""
        return BITS if self.dtype is HALF and not tuning.widens_halves(device) else self.dtype

    def stored(self, numbers: Tensor) -> Tensor:
        """Items given by their bits, unsigned, as they lie on that tensor's device."""
        dtype = self.on(numbers.device)
        return numbers.cast(BITS).bitcast(HALF) if dtype is HALF else numbers.cast(dtype)

    def shape(self, rows: int, columns: int) -> tuple[int, int]:
        return rows, columns // self.span * self.items


# ---- the layouts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """How one format lies on the device. `block` values take `size` bytes in the file; the arrays are `parts`. `span`
    neighbours in a row share a scale, and a half holds their quants exactly; 0: it does not."""
    name: str
    block: int
    size: int
    parts: tuple[Part, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]               # blocks (n, size) uint8 -> arrays (n, items)
    values_of: Callable[..., Tensor]                            # arrays (rows, items) -> values (rows, columns)
    octet: Callable[..., Octet]                                 # (arrays in a kernel, row, octet's number) -> Octet
    span: int = 32

    def repack(self, raw: Tensor) -> tuple[Tensor, ...]:
        """Rows of a file's bytes (rows, bytes) uint8 -> the layout's arrays, each (rows, items), not realized."""
        blocks = raw.reshape(-1, self.size)
        return tuple(part.stored(array).reshape(raw.shape[0], -1)
                     for array, part in zip(self.split(blocks), self.parts, strict=True))

    def values(self, arrays: tuple[Tensor, ...]) -> Tensor:
        """The values of packed rows, (rows, columns) float32: the kernels' twin."""
        return self.values_of(*arrays)

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a matrix in the file."""
        return rows * columns // self.block * self.size


def _fours(words: UOp, row: UOp, i: UOp) -> list[list[Field]]:
    """The low 4 bits of an octet's quants."""
    word = load(words, row, i)
    return [[Field(word, 4 * k, 4)] for k in range(OCTET)]


def _octet4(words: UOp, row: UOp, i: UOp, bias: int, scale: UOp, offset: UOp | None = None) -> Octet:
    return Octet(_fours(words, row, i), 4, bias, scale, offset)


def _octet5(words: UOp, high: UOp, row: UOp, i: UOp, bias: int, scale: UOp, offset: UOp | None = None) -> Octet:
    """Four bits of each quant from `words`, the fifth from `high`, where 32 values share a word."""
    fifth = load(high, row, i // 4) >> ((i % 4) * OCTET).cast(dtypes.uint32)
    fields = [[*low, Field(fifth, k, 1, 4)] for k, low in enumerate(_fours(words, row, i))]
    return Octet(fields, 5, bias, scale, offset)


def _pair(halves: UOp, row: UOp, i: UOp) -> tuple[UOp, UOp]:
    """Pair i of halves as float32: scale and minimum."""
    return half_to_float(load(halves, row, i * 2)), half_to_float(load(halves, row, i * 2 + 1))


def _byte(word: UOp, start: int) -> UOp:
    """The byte from bit `start` of a word on, as a float."""
    return above(8, moved(word, start, 8, TOP - 8)) - 256.0


def _k_pair(numbers: UOp, heads: UOp, row: UOp, i: UOp) -> tuple[UOp, UOp]:
    """Scale and offset of octet i in a K format: two numbers for each 32 values, of which a block's two halves make
    scale and minimum."""
    pair, (of_scales, of_minima) = load(numbers, row, i // 4), _pair(heads, row, i // 32)
    return of_scales * _byte(pair, 0), -(of_minima * _byte(pair, 8))


def _q6_octet(words: UOp, high: UOp, scales: UOp, heads: UOp, row: UOp, i: UOp) -> Octet:
    pairs = load(high, row, i // 2) >> ((i % 2) * 16).cast(dtypes.uint32)
    four = load(scales, row, i // 8) >> (((i // 2) % 4) * 8).cast(dtypes.uint32)
    scale = half_to_float(load(heads, row, i // 32)) * (_byte(four ^ 128, 0) - 128.0)
    fields = [[*low, Field(pairs, 2 * k, 2, 4)] for k, low in enumerate(_fours(words, row, i))]
    return Octet(fields, 6, 32, scale)


def _q8_octet(words: UOp, scales: UOp, row: UOp, i: UOp) -> Octet:
    pair = load(words, row, i * 2), load(words, row, i * 2 + 1)
    return Octet([[Field(word, 8 * k, 8)] for word in pair for k in range(4)], 8, 128,
                 half_to_float(load(scales, row, i // 4)))


def _plain_octet(widen: Callable[[UOp], UOp]) -> Callable[..., Octet]:
    return lambda values, row, i: Octet([], plain=[widen(load(values, row, i * OCTET + k)) for k in range(OCTET)])


def _k_split(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K or Q5_K blocks: the pairs of six-bit numbers, the scale's below the minimum's; the two halves."""
    pairs = span_bytes(blocks, 4, 16)
    first, second, third = pairs[:, :4], pairs[:, 4:8], pairs[:, 8:]
    scales = (first & 63).cat((third & 15) | (first >> 6 << 4), dim=1)      # (blocks, 8), 0..63
    minima = (second & 63).cat((third >> 4) | (second >> 6 << 4), dim=1)
    return scales | (minima << 8), pack_bits(span_bytes(blocks, 0, 4), 8, 2)


def _k_scales(numbers: Tensor, heads: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each 32 values, (rows, columns / 32) float32 each."""
    rows, numbers = numbers.shape[0], numbers.cast(WORD).reshape(-1, 8)             # (blocks, 8)
    d, m = (part.reshape(-1, 1) for part in pair_values(heads))
    return (d * (numbers & 255).float()).reshape(rows, -1), (m * (numbers >> 8).float()).reshape(rows, -1)


def _fifth_values(words: Tensor, high: Tensor) -> Tensor:
    return (unpack_bits(words, 4) | (unpack_bits(high, 1) << 4)).float()


def _q5_k_fifth(blocks: Tensor) -> Tensor:
    """Fifth bits in the values' order: the file has bit g of byte j for value 32 g + j."""
    groups = Tensor.arange(8, dtype=dtypes.uint32).reshape(1, 8, 1)
    return pack_bits(((span_bytes(blocks, 16, 48).unsqueeze(1) >> groups) & 1).reshape(blocks.shape[0], -1), 1)


def _q6_k_high(blocks: Tensor) -> Tensor:
    """Upper bit pairs in the values' order: of 32 bytes, bits 2g of byte j for value 32 g + j of their 128 values."""
    shifts = (Tensor.arange(4, dtype=dtypes.uint32) * 2).reshape(1, 1, 4, 1)
    pairs = (span_bytes(blocks, 128, 192).reshape(-1, 2, 1, 32) >> shifts) & 3
    return pack_bits(pairs.reshape(blocks.shape[0], -1), 2)


def _signed(bytes: Tensor) -> Tensor:
    return (bytes ^ 128).float() - 128


def _scaled(quants: Tensor, scales: Tensor, offsets: Tensor | None = None, span: int = 32) -> Tensor:
    """quants (rows, columns), scales and offsets (rows, columns / span)."""
    values = quants * spread(scales, span)
    return values if offsets is None else values + spread(offsets, span)


QUANTS4, FIFTH, SCALE, PAIR = Part(WORD, 8), Part(WORD, 32), Part(HALF, 32), Part(HALF, 32, 2)
BYTES, HEADS, HEAD = Part(BITS, 32), Part(HALF, 256, 2), Part(HALF, 256)

LAYOUTS = {layout.name: layout for layout in (
    Layout("F32", 1, 4, (Part(FLOAT, 1),),
           lambda b: (pack_bits(span_bytes(b, 0, 4), 8).bitcast(FLOAT),), lambda v: v,
           _plain_octet(lambda x: x), span=0),
    Layout("F16", 1, 2, (Part(HALF, 1),), lambda b: (pack_bits(span_bytes(b, 0, 2), 8, 2),), half_values,
           _plain_octet(half_to_float)),
    Layout("BF16", 1, 2, (Part(BITS, 1),), lambda b: (pack_bits(span_bytes(b, 0, 2), 8, 2),),
           lambda v: (v.cast(WORD) << 16).bitcast(FLOAT), _plain_octet(lambda x: (x << 16).bitcast(FLOAT)), span=0),
    Layout("Q8_0", 32, 34, (Part(WORD, 4), SCALE),      # quants stored as quant + 128
           lambda b: (pack_bits(span_bytes(b, 2, 34) ^ 128, 8), pack_bits(span_bytes(b, 0, 2), 8, 2)),
           lambda q, s: _scaled(unpack_bits(q, 8).float() - 128, half_values(s)), _q8_octet),
    Layout("Q4_0", 32, 18, (QUANTS4, SCALE),
           lambda b: (pack_bits(nibbles(span_bytes(b, 2, 18), 16), 4), pack_bits(span_bytes(b, 0, 2), 8, 2)),
           lambda q, s: _scaled(unpack_bits(q, 4).float() - 8, half_values(s)),
           lambda q, s, row, i: _octet4(q, row, i, 8, half_to_float(load(s, row, i // 4)))),
    Layout("Q4_1", 32, 20, (QUANTS4, PAIR),
           lambda b: (pack_bits(nibbles(span_bytes(b, 4, 20), 16), 4), pack_bits(span_bytes(b, 0, 4), 8, 2)),
           lambda q, p: _scaled(unpack_bits(q, 4).float(), *pair_values(p)),
           lambda q, p, row, i: _octet4(q, row, i, 0, *_pair(p, row, i // 4))),
    Layout("Q5_0", 32, 22, (QUANTS4, FIFTH, SCALE),
           lambda b: (pack_bits(nibbles(span_bytes(b, 6, 22), 16), 4), pack_bits(span_bytes(b, 2, 6), 8),
                      pack_bits(span_bytes(b, 0, 2), 8, 2)),
           lambda q, h, s: _scaled(_fifth_values(q, h) - 16, half_values(s)),
           lambda q, h, s, row, i: _octet5(q, h, row, i, 16, half_to_float(load(s, row, i // 4)))),
    Layout("Q5_1", 32, 24, (QUANTS4, FIFTH, PAIR),
           lambda b: (pack_bits(nibbles(span_bytes(b, 8, 24), 16), 4), pack_bits(span_bytes(b, 4, 8), 8),
                      pack_bits(span_bytes(b, 0, 4), 8, 2)),
           lambda q, h, p: _scaled(_fifth_values(q, h), *pair_values(p)),
           lambda q, h, p, row, i: _octet5(q, h, row, i, 0, *_pair(p, row, i // 4))),
    Layout("Q4_K", 256, 144, (QUANTS4, BYTES, HEADS),
           lambda b: (pack_bits(nibbles(span_bytes(b, 16, 144), 32), 4), *_k_split(b)),
           lambda q, s, h: (lambda d, m: _scaled(unpack_bits(q, 4).float(), d, -m))(*_k_scales(s, h)),
           lambda q, s, h, row, i: _octet4(q, row, i, 0, *_k_pair(s, h, row, i))),
    Layout("Q5_K", 256, 176, (QUANTS4, FIFTH, BYTES, HEADS),
           lambda b: (pack_bits(nibbles(span_bytes(b, 48, 176), 32), 4), _q5_k_fifth(b), *_k_split(b)),
           lambda q, f, s, h: (lambda d, m: _scaled(_fifth_values(q, f), d, -m))(*_k_scales(s, h)),
           lambda q, f, s, h, row, i: _octet5(q, f, row, i, 0, *_k_pair(s, h, row, i))),
    Layout("Q6_K", 256, 210, (QUANTS4, Part(WORD, 16), Part(WORD, 64), HEAD),
           lambda b: (pack_bits(nibbles(span_bytes(b, 0, 128), 64), 4), _q6_k_high(b),
                      pack_bits(span_bytes(b, 192, 208), 8), pack_bits(span_bytes(b, 208, 210), 8, 2)),
           lambda q, p, s, h: _scaled((unpack_bits(q, 4) | (unpack_bits(p, 2) << 4)).float() - 32,
                                      spread(half_values(h), 16) * _signed(unpack_bits(s, 8)), span=16), _q6_octet,
           span=16),
)}
