"""Solutions of chapter 14's exercises."""
from collections.abc import Sequence

import numpy as np


def best_length(shares: Sequence[float], more: float, draft: float) -> int:
    """Tokens of a round are 1 + p1 + p1 p2 + ...; its cost 1 + n (more + draft)."""
    tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(shares))])     # by number of drafts
    return int(np.argmax(tokens / (1 + np.arange(len(tokens)) * (more + draft))))


def instead(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """What kept drafts leave of p, scaled to sum 1."""
    left = np.maximum(p - q, 0)
    return left / left.sum() if left.sum() > 0 else p


def round_cost(drafts: int, rate: float, faster: float) -> float:
    """A round gives 1 + drafts * rate tokens, and `faster` of them in the time of one without drafts."""
    return (1 + drafts * rate) / faster
