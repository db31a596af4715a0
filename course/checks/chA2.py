"""Checks of appendix A2's exercises."""
import math
from collections.abc import Callable

import numpy as np

from checks import examine, expects


def check_bits_per_byte(yours: Callable[[float, int, int], float]) -> bool:
    """(mean loss in nats a token, tokens, bytes) -> bits a byte."""
    def case(nats: float, tokens: int, size: int) -> str | None:
        return expects(yours(nats, tokens, size), nats * tokens / (math.log(2) * size))
    return examine("bits_per_byte", {
        "one bit a token, one byte a token": lambda: case(math.log(2), 100, 100),
        "three bytes a token": lambda: case(math.log(2), 100, 300),
        "a uniform guess among 4,096": lambda: case(math.log(4096), 1000, 3300),
        "a model that is never surprised": lambda: case(0.0, 1000, 3300)})


def check_bytes_kept(yours: Callable[..., int]) -> bool:
    """(weights in matrices, other weights, muon=True) -> bytes that stay between two steps."""
    def case(matrices: int, others: int, muon: bool = True) -> str | None:
        wanted = 4 * (2 * matrices + 3 * others) if muon else 12 * (matrices + others)
        got = yours(matrices, others) if muon else yours(matrices, others, muon=False)
        if not isinstance(got, (int, float, np.number)) or isinstance(got, bool):
            return f"expected a number, got {got!r:.60}"
        return None if got == wanted else (
            f"{matrices} in matrices, {others} others, muon={muon}: expected {wanted}, got {got}")
    return examine("bytes_kept", {
        "one matrix weight under Muon": lambda: case(1, 0), "one vector weight": lambda: case(0, 1),
        "both": lambda: case(1000, 10), "Adam for all": lambda: case(1000, 10, False),
        "8 billion, Adam for all": lambda: case(8 * 10**9, 0, False)})


def check_clipped(yours: Callable[[list[np.ndarray], float], list[np.ndarray]]) -> bool:
    """(gradients, limit) -> the same, scaled together so that their common norm is at most the limit."""
    def case(grads: list[list[float]], limit: float) -> str | None:
        given = [np.array(grad) for grad in grads]
        norm = math.sqrt(sum(float((grad ** 2).sum()) for grad in given))
        factor = min(1.0, limit / norm) if norm else 1.0
        got = yours([grad.copy() for grad in given], limit)
        if not isinstance(got, list) or [np.shape(grad) for grad in got] != [grad.shape for grad in given]:
            return f"expected a list of {len(given)} arrays with the shapes that they had, got {got!r:.60}"
        if all(np.allclose(mine, grad * factor, rtol=1e-5) for mine, grad in zip(got, given, strict=True)):
            return None
        found = [np.round(grad, 4).tolist() for grad in got]
        return f"{grads}, limit {limit}: expected each times {factor:.4g}, got {found}"
    return examine("clipped", {
        "below the limit: as they are": lambda: case([[0.3, 0.4]], 1.0),
        "one array above it": lambda: case([[3.0, 4.0]], 1.0),
        "each below it, together above": lambda: case([[0.8], [0.6, 0.0], [2.4]], 1.0),
        "a large one and a small one keep their proportion": lambda: case([[10.0, 0.0], [0.1]], 2.0),
        "matrices": lambda: case([[[1.0, 2.0], [2.0, 4.0]], [[1.0]]], 0.5)})
