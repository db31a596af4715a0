"""Solutions of chapter 04's exercises."""
import numpy as np
from tinygrad import Tensor


def state_after_twice(k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """The first write leaves k vᵀ, which reads as |k|² v; (1 - |k|²) v is missing, and the second write adds it.

    A key of length 1 leaves k vᵀ. With |k|² = n each further write multiplies what is missing by 1 - n: above n = 2
    it grows without end.
    """
    return np.outer(k, v) * (2 - k @ k)


def forgets(rule) -> bool:
    """Two memories that differ in every head, one token: what comes out must not differ."""
    q, k = np.ones((1, 2, 4)) / 2, np.ones((1, 2, 4)) / 2
    v, g, beta = np.ones((1, 4, 4)), np.full((1, 4), -200.0), np.full((1, 4), 0.5)
    empty_out, empty_state = rule(q, k, v, g, beta, np.zeros((4, 4, 4)))
    full_out, full_state = rule(q, k, v, g, beta, np.random.default_rng(0).standard_normal((4, 4, 4)))
    return bool(np.allclose(empty_out, full_out) and np.allclose(empty_state, full_state))


def share(x: Tensor, heads: int) -> Tensor:
    """Expanding an axis of length 1 and merging it with its neighbour are both views: only the index changes."""
    tokens, k_heads, dim = x.shape
    each = heads // k_heads
    return x.unsqueeze(2).expand(tokens, k_heads, each, dim).reshape(tokens, heads, dim)
