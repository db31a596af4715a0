"""Bugs of one line that chapter 12's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from dataclasses import replace

from tinygrad import Tensor, dtypes


def subnormal_scales_are_zero(original):
    """A half whose exponent is 0 is taken for 0, as where halves are emulated carelessly."""
    def half_to_float(bits):
        if bits.dtype == dtypes.half:
            bits = bits.bitcast(dtypes.uint16).cast(dtypes.uint32)
        value = original(bits)
        return (bits & 0x7c00).eq(0).where(0.0, value)
    return half_to_float


def bias_of_seven(original):
    """Four-bit quants stand for -7 to 8 instead of -8 to 7, in the kernels alone."""
    return lambda words, row, i, bias, *scales: original(words, row, i, max(bias - 1, 0), *scales)


def low_halves_dropped(original):
    """Rows of x are split into halves, and the low ones are lost: what tensor cores would give without the split."""
    def split(*given):
        made = original(*given)
        return replace(made, parts=(made.parts * Tensor([[1.0], [0.0]])).cast(made.parts.dtype).contiguous())
    return split


BUGS = {
    "subnormal scales are taken for zero": ("minillama.kernels.layouts", "half_to_float", subnormal_scales_are_zero),
    "the kernels take 7 off a four-bit quant instead of 8": ("minillama.kernels.layouts", "_octet4", bias_of_seven),
    "the low halves of x are lost": ("minillama.kernels.tensor_cores", "split", low_halves_dropped),
}
