"""Checks of chapter 04's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from checks import examine
from minillama.measure import counts_of

Rule = Callable[..., tuple[np.ndarray, np.ndarray]]


def close_to(got, wanted: np.ndarray, what: str = "", tolerance: float = 1e-5) -> str | None:
    """None when an array is the wanted one, else a sentence that says where it differs most."""
    if isinstance(got, Tensor):
        got = got.numpy()
    if not isinstance(got, np.ndarray):
        return f"expected an array of shape {wanted.shape}, got {got!r:.60}"
    if got.shape != wanted.shape:
        return f"{what}expected the shape {wanted.shape}, got {got.shape}"
    off = np.abs(got.astype(np.float64) - wanted)
    if np.isfinite(off).all() and off.max() <= tolerance:
        return None
    at = np.unravel_index(np.where(np.isfinite(off), off, np.inf).argmax(), off.shape)
    place = ", ".join(str(int(i)) for i in at)
    return f"{what}at [{place}] expected {wanted[at]:.4g}, got {got[at]:.4g}"


def check_state_after_twice(yours: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """(k (dim,), v (dim,)) -> the state (dim, dim) after the pair was written twice into an empty memory."""
    def twice(length: float) -> str | None:
        rng = np.random.default_rng(0)
        k, v, state = rng.standard_normal(8), rng.standard_normal(8), np.zeros((8, 8))
        k *= length / np.linalg.norm(k)
        for _ in range(2):
            state = state + np.outer(k, v - state.T @ k)
        return close_to(yours(k.copy(), v.copy()), state)

    return examine("state_after_twice", {
        "a key of length 1: the second write finds nothing missing": lambda: twice(1.0),
        "a key of length 0.5: half-heartedly written, twice": lambda: twice(0.5),
        "a key of length √2: the second write takes back what the first did": lambda: twice(2 ** 0.5),
    })


def _rule(decays: bool = True, late: bool = False, only: int = 4) -> Rule:
    """The delta rule in numpy, right or broken: without decay, decaying after the write, in `only` some heads."""
    def rule(q, k, v, g, beta, state):
        state, out = np.array(state, dtype=np.float64), np.zeros(np.shape(v))
        for t in range(len(v)):
            for head in range(len(state)):
                key, query = (x[t, head * x.shape[1] // len(state)] for x in (k, q))
                decay = np.exp(g[t, head]) if decays and head < only else 1.0
                memory = state[head] if late else state[head] * decay
                memory = memory + np.outer(key, beta[t, head] * (v[t, head] - memory.T @ key))
                state[head] = memory * decay if late else memory
                out[t, head] = memory.T @ query / np.sqrt(len(query))
        return out, state
    return rule


def check_forgets(yours: Callable[[Rule], bool]) -> bool:
    """(rule) -> whether a decay of 0 forgets everything from before."""
    def says(wanted: bool, rule: Rule) -> str | None:
        got = yours(rule)
        if not isinstance(got, (bool, np.bool_)):
            return f"expected True or False, got {got!r:.60}"
        return None if got == wanted else f"your test said {bool(got)}"

    return examine("forgets", {
        "a right rule: True": lambda: says(True, _rule()),
        "a rule that ignores g: False": lambda: says(False, _rule(decays=False)),
        "a rule that decays after the write, when the answer was given from the old memory: False":
            lambda: says(False, _rule(late=True)),
        "a rule in which the last head never forgets: False": lambda: says(False, _rule(only=3)),
    })


def check_share(yours: Callable[[Tensor, int], Tensor]) -> bool:
    """(x (tokens, k_heads, dim), heads) -> (tokens, heads, dim), values shared and nothing copied."""
    rng = np.random.default_rng(1)

    def numbers(*shape: int) -> Tensor:
        return Tensor(rng.standard_normal(shape).astype(np.float32)).realize()

    def values(tokens: int, k_heads: int, heads: int) -> str | None:
        x = numbers(tokens, k_heads, 8)
        return close_to(yours(x, heads), np.repeat(x.numpy(), heads // k_heads, axis=1))

    def counted() -> str | None:
        x, other = numbers(3, 16, 8), numbers(3, 32, 8)
        counts = counts_of(lambda: (yours(x, 32) * other).realize())
        if (counts.kernels, counts.copies) == (1, 0):
            return None
        return (f"x (3, 16, 8) shared by 32 heads and multiplied took {counts.kernels} kernels, "
                f"{counts.copies} of them copies; 1 is enough")

    return examine("share", {
        "2 heads for 4": lambda: values(5, 2, 4), "16 heads for 32": lambda: values(2, 16, 32),
        "3 heads for 9: three neighbours each": lambda: values(1, 3, 9),
        "as many as there are": lambda: values(4, 2, 2),
        "nothing is copied": counted,
    })
