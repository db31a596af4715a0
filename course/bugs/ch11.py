"""Bugs of one line that chapter 11's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def answers_before_it_writes(original):
    """The output is read from the decayed memory, without what this token writes."""
    def one_token(gates, t, v, sums, scale):
        keep, write, _ = original(gates, t, v, sums, scale)
        _, sq, _, qq, _ = sums
        return keep, write, keep * sq * (qq + 1e-6).rsqrt() * scale
    return one_token


def next_column(original):
    """All but the first of the stacked projections are read one column too late."""
    def columns(x, weights, widths):
        return [(y, first + (first > 0)) for y, first in original(x, weights, widths)]
    return columns


BUGS = {
    "the answer comes from the memory before the write": ("minillama.kernels.delta", "one_token",
                                                          answers_before_it_writes),
    "stacked projections are read one column too late": ("minillama.layers", "columns", next_column),
}
