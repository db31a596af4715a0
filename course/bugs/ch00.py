"""Bugs that chapter 00's *equal* cells must catch: what is wrong -> (module, attribute, replacement).

What this chapter computes, it computes with tinygrad alone (the package only takes the time): tinygrad is broken here.
"""


def runs_no_kernel(original):
    """A replay runs nothing: its result is a buffer that no kernel has filled."""
    def replay(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return result.zeros_like() if self.cnt > 2 else result      # the first call runs plainly, the second captures
    return replay


def halves(original):
    """A product reads its numbers rounded to 16 bits."""
    return lambda a, b: original(a.half().contiguous().float(), b.half().contiguous().float())


BUGS = {
    "a replay runs no kernel": ("tinygrad.engine.jit", "_TinyJit.__call__", runs_no_kernel),
    "a product reads its numbers in half precision": ("tinygrad", "Tensor.__matmul__", halves),
}
