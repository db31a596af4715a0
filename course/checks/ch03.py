"""Checks of chapter 03's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from checks import examine
from minillama.layers import rope, rope_table
from minillama.measure import counts_of


def _numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _near(got: np.ndarray, wanted: np.ndarray, tolerance: float = 1e-5) -> str | None:
    if got.shape != wanted.shape:
        return f"expected the shape {wanted.shape}, got {got.shape}"
    off = np.abs(got - wanted)
    if off.max() < tolerance:
        return None
    where = tuple(int(i) for i in np.unravel_index(off.argmax(), off.shape))
    return f"max |difference| is {off.max():.3g}, at {where}: {got[where]:.6g} instead of {wanted[where]:.6g}"


def check_norm_of_checkpoint(yours: Callable[[Tensor, Tensor, float], Tensor]) -> bool:
    """x (rows, dim), what the checkpoint stores (dim,), eps -> normed rows."""
    def same(x: np.ndarray, stored: np.ndarray, eps: float = 1e-6) -> str | None:
        wanted = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + eps) * (1 + stored)
        return _near(yours(Tensor(x), Tensor(stored), eps).numpy(), wanted)

    return examine("norm_of_checkpoint", {
        "stored 0: rows of size 1": lambda: same(3 * _numbers(4, 32), np.zeros(32, np.float32)),
        "stored 0.5: rows of size 1.5": lambda: same(_numbers(4, 32), np.full(32, 0.5, np.float32)),
        "random weights": lambda: same(_numbers(4, 32), _numbers(32, seed=1)),
        "a row of zeros gives zeros (eps stands inside the root)": lambda: same(np.zeros((1, 32), np.float32),
                                                                                _numbers(32, seed=1)),
        "a very small row": lambda: same(1e-4 * _numbers(2, 32), _numbers(32, seed=1)),
    })


def check_shared_scores(yours: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """q (tokens, heads, dim), k (positions, kv_heads, dim) -> scores (heads, tokens, positions), without copying k."""
    def case(tokens: int, heads: int, positions: int, kv_heads: int, dim: int = 16) -> tuple[np.ndarray, np.ndarray]:
        return _numbers(tokens, heads, dim), _numbers(positions, kv_heads, dim, seed=1)

    def right(*sizes: int) -> str | None:
        q, k = case(*sizes)
        repeated = np.repeat(k, q.shape[1] // k.shape[1], axis=1)               # (positions, heads, dim)
        return _near(yours(Tensor(q), Tensor(k)).numpy(), np.einsum("thd,phd->htp", q, repeated), 1e-4)

    def counted() -> str | None:
        q, k = (Tensor(x).realize() for x in case(1, 16, 512, 2, 64))
        counts = counts_of(yours, q, k)
        if not counts.copies:
            return None
        return f"{counts.copies} copies; {counts.bytes:,} bytes in all, and k has {k.nbytes():,}"

    return examine("shared_scores", {
        "as many KV heads as heads": lambda: right(3, 2, 5, 2), "4 heads on 2": lambda: right(3, 4, 5, 2),
        "6 heads on 1": lambda: right(2, 6, 7, 1), "nothing is copied": counted,
    })


def check_window(yours: Callable[[int, int, int], np.ndarray]) -> bool:
    """(tokens, start, width) -> which positions each token sees, (tokens, start + tokens) of truth values."""
    def same(tokens: int, start: int, width: int) -> str | None:
        got = yours(tokens, start, width)
        got = got.numpy() if isinstance(got, Tensor) else got
        if not isinstance(got, np.ndarray) or got.shape != (tokens, start + tokens):
            return f"expected shape {(tokens, start + tokens)}, got {getattr(got, 'shape', type(got).__name__)}"
        for row in range(tokens):
            seen, wanted = set(np.flatnonzero(got[row])), set(range(max(0, start + row - width + 1), start + row + 1))
            if seen != wanted:
                return f"token {start + row} should see {sorted(wanted)}, sees {sorted(int(i) for i in seen)}"
        return None

    return examine("window", {
        "4 tokens from the start, window 2": lambda: same(4, 0, 2),
        "window 1: each sees itself": lambda: same(3, 0, 1),
        "3 tokens from position 5, window 4": lambda: same(3, 5, 4),
        "a window wider than the text is the causal mask": lambda: same(4, 3, 100),
    })


def check_unrotate(yours: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """x (tokens, heads, dim) that was rotated by table (tokens, 2, half) -> x as it was."""
    def undone(tokens: int, dim: int, dims: int) -> str | None:
        x, table = _numbers(tokens, 2, dim), rope_table(tokens, dims, 1e4)
        return _near(yours(rope(Tensor(x), table), table).numpy(), x)

    def turned() -> str | None:
        x, table = _numbers(4, 1, 8), rope_table(4, 8, 1e4)
        if np.abs(yours(Tensor(x), table).numpy() - x).max() > 0.1:
            return None
        return "rows that were not rotated came back unchanged: it does nothing"

    return examine("unrotate", {
        "all of 8 dimensions": lambda: undone(5, 8, 8), "the first 4 of 16": lambda: undone(5, 16, 4),
        "64 of 256, as in the 80B": lambda: undone(3, 256, 64), "it does turn something": turned,
    })
