"""Solutions of appendix A2's exercises."""
import math

import numpy as np


def bits_per_byte(nats: float, tokens: int, size: int) -> float:
    """All nats of the text, in bits, over its bytes."""
    return nats * tokens / math.log(2) / size


def bytes_kept(matrices: int, others: int, muon: bool = True) -> int:
    """A weight and its means, four bytes each: one mean under Muon, two under Adam."""
    each = 2 if muon else 3
    return 4 * (each * matrices + 3 * others)


def clipped(grads: list[np.ndarray], limit: float) -> list[np.ndarray]:
    """One norm over all numbers, one factor for all arrays."""
    norm = math.sqrt(sum(float((grad ** 2).sum()) for grad in grads))
    factor = limit / max(norm, limit)
    return [grad * factor for grad in grads]
