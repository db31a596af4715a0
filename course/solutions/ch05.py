"""Solutions of chapter 05's exercises."""
import numpy as np


def solve_rows(lower: np.ndarray, r: np.ndarray) -> np.ndarray:
    """Each row waits for all rows before it: n - 1 dependent steps."""
    x = r.copy()
    for i in range(1, len(r)):
        x[i] -= lower[i, :i] @ x[:i]
    return x


def decay_between(g: np.ndarray) -> np.ndarray:
    """Column j holds g from row j + 1 on; summing downwards gives the sum from j + 1 to i without a subtraction.

    Above the diagonal the sums are 0 and their exponential 1, so the table is masked once more.
    """
    count = len(g)
    columns = np.tril(np.repeat(g[:, None], count, axis=1), -1)
    return np.tril(np.exp(np.cumsum(columns, axis=0)))


def run_padded(rule, k, v, g, beta, state, chunk: int):
    """g = 0: nothing fades. beta = 0: nothing is written. What stands in k and v is then of no account."""
    tokens, extra = len(k), -len(k) % chunk
    k, v = (np.pad(x, ((0, extra), (0, 0))) for x in (k, v))
    g, beta = (np.pad(x, (0, extra)) for x in (g, beta))
    writes, state = rule(k, v, g, beta, state)
    return writes[:tokens], state
