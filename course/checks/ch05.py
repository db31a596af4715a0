"""Checks of chapter 05's exercises."""
from collections.abc import Callable

import numpy as np

from checks import examine
from checks.ch04 import close_to


def check_solve_rows(yours: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """(lower (n, n), r (n, dim)) -> x with (I + lower) x = r."""
    rng = np.random.default_rng(0)

    def case(lower: np.ndarray) -> str | None:
        r = rng.standard_normal((len(lower), 3))
        return close_to(yours(lower.copy(), r.copy()), np.linalg.solve(np.eye(len(lower)) + lower, r))

    return examine("solve_rows", {
        "one row: nothing comes before it": lambda: case(np.zeros((1, 1))),
        "two rows, L = 0.5": lambda: case(np.array([[0, 0], [0.5, 0]])),
        "8 random rows": lambda: case(np.tril(rng.standard_normal((8, 8)), -1)),
        "one key 64 times": lambda: case(np.tril(np.ones((64, 64)), -1)),
    })


def check_decay_between(yours: Callable[[np.ndarray], np.ndarray]) -> bool:
    """(g (tokens,)) -> the decay from token j to token i, (tokens, tokens), 0 above the diagonal."""
    def case(*values: float) -> str | None:
        g = np.array(values, dtype=np.float32)
        count, exact = len(g), np.zeros((len(g), len(g)))
        for i in range(count):
            for j in range(i + 1):
                exact[i, j] = np.exp(g[j + 1:i + 1].astype(np.float64).sum())
        with np.errstate(all="ignore"):
            return close_to(yours(g.copy()), exact, "row i, column j: ", 1e-6)

    return examine("decay_between", {
        "three tokens": lambda: case(-1.0, -0.5, -0.25),
        "no decay at all": lambda: case(0.0, 0.0, 0.0, 0.0),
        "8 tokens that forget everything (g = -50)": lambda: case(*[-50.0] * 8),
        "32 tokens of -50, then 32 of -0.001: six digits in float32": lambda: case(*[-50.0] * 32, *[-0.001] * 32),
    })


def _rule(k, v, g, beta, state):
    writes = []
    for i in range(len(k)):
        state = state * np.exp(g[i])
        writes.append(beta[i] * (v[i] - state.T @ k[i]))
        state = state + np.outer(k[i], writes[-1])
    return np.array(writes).reshape(-1, v.shape[1]), state


def check_run_padded(yours: Callable) -> bool:
    """(rule, k, v, g, beta, state, chunk) -> writes (tokens, dim) of the real tokens, and the state after them."""
    def case(tokens: int, chunk: int = 8) -> str | None:
        rng, seen = np.random.default_rng(tokens), []

        def rule(k, v, g, beta, state):
            seen.append(len(k))
            return _rule(k, v, g, beta, state)

        k, v = rng.standard_normal((tokens, 4)) / 2, rng.standard_normal((tokens, 4))
        g, beta, state = -rng.random(tokens), rng.random(tokens), rng.standard_normal((4, 4))
        got = yours(rule, k.copy(), v.copy(), g.copy(), beta.copy(), state.copy(), chunk)
        if any(size % chunk for size in seen) or not seen:
            return f"the rule was called with {seen} tokens; it takes multiples of {chunk}"
        if not (isinstance(got, tuple) and len(got) == 2):
            return f"expected (writes, state), got {got!r:.60}"
        wanted = _rule(k, v, g, beta, state)
        return close_to(got[0], wanted[0], "writes: ") or close_to(got[1], wanted[1], "state: ", 1e-12)

    return examine("run_padded", {
        "8 tokens: nothing to pad": lambda: case(8), "5 tokens in a chunk of 8": lambda: case(5),
        "9 tokens: one in the second chunk": lambda: case(9), "1 token": lambda: case(1),
        "13 tokens in chunks of 4": lambda: case(13, 4),
    })
