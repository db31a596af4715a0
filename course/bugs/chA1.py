"""Bugs of one line that appendix A1's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from tinygrad import dtypes


def forgets_the_weight(original):
    """Rows are scaled to root mean square 1, and left there."""
    def rms_norm(x, weight, eps):
        return original(x, (weight * 0 + 1).realize(), eps)
    return rms_norm


def subnormals_are_zero(original):
    """Widened as a device without halves does it; where halves lie as such, they are left alone."""
    def half_to_float(bits):
        if bits.dtype == dtypes.half:
            return original(bits)
        return (bits & 0x7C00).ne(0).where(original(bits), original(bits & 0))
    return half_to_float


BUGS = {
    "the norm's weight is forgotten": ("minillama.kernels.norm", "rms_norm", forgets_the_weight),
    "subnormal halves become zero": ("minillama.kernels.layouts", "half_to_float", subnormals_are_zero),
}
