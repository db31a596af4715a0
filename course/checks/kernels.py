"""What checks of hand-written kernels share: a sentence for what is no kernel."""
from collections.abc import Callable

from tinygrad.uop.ops import Ops, UOp

Kernel = Callable[..., UOp]


class NotAKernel(TypeError):
    """What a learner's function returned is no kernel; the message says why."""


def checked(yours: Kernel) -> Kernel:
    """`yours`, with a sentence in place of tinygrad's own error where what it returns is no kernel."""
    def kernel(*buffers: UOp) -> UOp:
        made = yours(*buffers)
        if not isinstance(made, UOp) or made.op is not Ops.SINK:
            what = made.op.name if isinstance(made, UOp) else f"{made!r:.40}"
            raise NotAKernel(f"a kernel returns a UOp (what `.sink(...)` gives), not {what}")
        if made.ranges:
            ends = ", ".join(f"number {r.arg[0]}" for r in made.ranges)
            raise NotAKernel(f"a range is still open ({ends}): `.reduce(...)` sums over it, `.end(...)` closes it")
        return made
    return kernel
