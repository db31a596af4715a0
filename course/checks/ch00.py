"""Checks of chapter 00's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from checks import examine, expects
from minillama.measure import counts_of


def check_seconds_allowed(yours: Callable[[float, float, float, float], float]) -> bool:
    """(bytes_moved, operations, bandwidth, speed) -> the least seconds."""
    return examine("seconds_allowed", {
        "a copy: 1 GB, no arithmetic, 10 GB/s": lambda: expects(yours(1e9, 0, 10e9, 50e9), 0.1),
        "a product: 1 MB, 10¹¹ operations, 50 GFLOP/s": lambda: expects(yours(1e6, 1e11, 10e9, 50e9), 2.0),
        "exactly on the ridge: both take 1 s": lambda: expects(yours(10e9, 50e9, 10e9, 50e9), 1.0),
        "memory and arithmetic overlap, so they do not add up": lambda: expects(yours(2e9, 5e9, 10e9, 50e9), 0.2),
    })


def check_tokens_per_second(yours: Callable[[float, float, float], float]) -> bool:
    """(parameters, bits, bandwidth) -> the most tokens a second."""
    return examine("tokens_per_second", {
        "10⁹ parameters, 8 bits, 100 GB/s": lambda: expects(yours(1e9, 8, 100e9), 100.0),
        "half the bits, twice the tokens": lambda: expects(yours(1e9, 4, 100e9), 200.0),
        "blocks with a scale: 4.5 bits a weight": lambda: expects(yours(2e9, 4.5, 36e9), 32.0),
    })


def check_tokens_to_balance(yours: Callable[[float, float, float], float]) -> bool:
    """(bytes_per_weight, bandwidth, speed) -> tokens at which memory and arithmetic take equally long."""
    def balanced(bytes_per_weight: float, bandwidth: float, speed: float) -> str | None:
        tokens, weights = yours(bytes_per_weight, bandwidth, speed), 1e6
        if not isinstance(tokens, (int, float)) or tokens <= 0:
            return f"expected a positive number of tokens, got {tokens!r}"
        memory, arithmetic = weights * bytes_per_weight / bandwidth, 2 * weights * tokens / speed
        if abs(memory - arithmetic) <= 1e-6 * memory:
            return None
        return f"at {tokens:.6g} tokens memory takes {memory:.3g} s and arithmetic {arithmetic:.3g} s"

    return examine("tokens_to_balance", {
        "float32 weights, 10 GB/s, 50 GFLOP/s": lambda: balanced(4, 10e9, 50e9),
        "half precision, the same machine": lambda: balanced(2, 10e9, 50e9),
        "4.5 bits a weight, a machine with far more arithmetic": lambda: balanced(4.5 / 8, 1e12, 200e12),
    })


def check_one_kernel(yours: Callable[[Tensor], Tensor]) -> bool:
    """(1024,) -> (1024,): the same values as the starter's, in one kernel."""
    numbers = np.linspace(-3, 3, 1024, dtype=np.float32)
    x = Tensor(numbers).realize()

    def right() -> str | None:
        wanted, got = np.maximum(numbers * 2 + 1, 0) ** 2, yours(x).numpy()
        if got.shape != wanted.shape:
            return f"expected the shape {wanted.shape}, got {got.shape}"
        off = np.abs(got - wanted)
        return None if off.max() < 1e-5 else f"max |difference| is {off.max():.3g}, at x = {numbers[off.argmax()]:.3g}"

    def counted() -> str | None:
        counts = counts_of(yours, x)
        if counts.kernels == 1:
            return None
        return f"it ran {counts.kernels} kernels and moved {counts.bytes:,} bytes; each .realize() ends a kernel"

    return examine("one_kernel", {"the values": right, "the number of kernels": counted})
