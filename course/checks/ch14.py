"""Checks of chapter 14's exercises."""
from collections.abc import Callable, Sequence

import numpy as np

from checks import examine, expects


def check_best_length(yours: Callable[[Sequence[float], float, float], int]) -> bool:
    """(shares, more, draft) -> how many drafts give most tokens in a time; 0 where drafting loses."""
    def case(shares: list[float], more: float, draft: float, wanted: int) -> str | None:
        got = yours(list(shares), more, draft)
        if isinstance(got, bool) or not isinstance(got, (int, np.integer)):
            return f"expected a whole number, got {got!r:.40}"
        return None if got == wanted else f"shares {shares}, more {more}, draft {draft}: expected {wanted}, got {got}"

    return examine("best_length", {
        "all kept, nothing costs: as many as there are": lambda: case([1.0, 1.0, 1.0], 0.0, 0.0, 3),
        "none kept": lambda: case([0.0, 0.0], 0.1, 0.1, 0),
        "a pass over two tokens costs two passes": lambda: case([0.9, 0.8, 0.7], 1.0, 0.1, 0),
        "the third is hardly ever right": lambda: case([0.9, 0.8, 0.05], 0.1, 0.1, 2),
        "one pays, the second does not": lambda: case([0.9, 0.5, 0.5], 0.35, 0.15, 1),
        "what comes after a draft never kept": lambda: case([0.6, 0.0, 1.0, 1.0], 0.1, 0.05, 1),
        "no block, no drafts": lambda: case([], 0.1, 0.1, 0),
    })


def check_instead(yours: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> bool:
    """(p, q) -> the distribution from which the token comes that takes a rejected draft's place."""
    def case(p: list[float], q: list[float], wanted: list[float]) -> str | None:
        with np.errstate(all="ignore"):
            got = yours(np.array(p), np.array(q))
        if not isinstance(got, np.ndarray) or got.shape != (len(p),):
            return f"expected an array of {len(p)} probabilities, got {got!r:.60}"
        off = np.abs(got.astype(float) - wanted)
        if not np.isfinite(off).all() or off.max() > 1e-9:
            return f"p {p}, q {q}: expected {wanted}, got {[round(float(x), 4) for x in got]}"
        return None

    def adds_up() -> str | None:
        rng = np.random.default_rng(0)
        p, q = rng.dirichlet(np.ones(9), 2)
        both = np.minimum(p, q)
        got = yours(p.copy(), q.copy())
        if not isinstance(got, np.ndarray):
            return f"expected an array, got {got!r:.60}"
        return None if np.allclose(both + (1 - both.sum()) * got, p) else "kept drafts and yours together are not p"

    return examine("instead", {
        "two tokens": lambda: case([0.75, 0.25], [0.25, 0.75], [1.0, 0.0]),
        "three tokens": lambda: case([0.5, 0.375, 0.125], [0.25, 0.25, 0.5], [2 / 3, 1 / 3, 0.0]),
        "a draft that the model excludes": lambda: case([0.5, 0.5, 0.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0]),
        "with what is kept, it makes p": adds_up,
        "q is p: nothing is ever rejected; give p": lambda: case([0.5, 0.3, 0.2], [0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
    })


def check_round_cost(yours: Callable[[int, float, float], float]) -> bool:
    """(drafts, rate, faster) -> what a round takes, in tokens without drafts."""
    def case(drafts: int, rate: float, faster: float, wanted: float) -> str | None:
        got = yours(drafts, rate, faster)
        return expects(float(got) if isinstance(got, np.floating) else got, wanted)

    return examine("round_cost", {
        "one draft, always kept, twice as fast: a round is a token's time": lambda: case(1, 1.0, 2.0, 1.0),
        "three drafts, none kept, at half the speed": lambda: case(3, 0.0, 0.5, 2.0),
        "two drafts, half of them kept, no faster": lambda: case(2, 0.5, 1.0, 2.0),
        "four drafts": lambda: case(4, 0.75, 1.6, 2.5),
    })
