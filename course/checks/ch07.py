"""Checks of chapter 07's exercises."""
from collections.abc import Callable

import numpy as np

from checks import examine, expects
from minillama.engine import BATCHES, Engine
from minillama.measure import Call
from minillama.show.steps import Step


def _engine(batches: tuple[int, ...]) -> Engine:
    """An engine's batch sizes without an engine: `plan` looks at nothing else."""
    bare = object.__new__(Engine)
    bare.batches = batches
    return bare


def check_plan(yours: Callable[[int, tuple[int, ...]], list[int]]) -> bool:
    """(tokens, sizes) -> the sizes of the batches that a prompt is cut into."""
    def as_engine(lengths: range, batches: tuple[int, ...]) -> str | None:
        for tokens in lengths:
            got, wanted = yours(tokens, batches), _engine(batches).plan(tokens)
            if got != wanted:
                return f"{tokens} tokens: expected {wanted}, got {got!r:.60}"
        return None

    def covers() -> str | None:
        for tokens in (1, 3, 9, 33, 100, 257, 1000):
            sizes = yours(tokens, BATCHES)
            if not isinstance(sizes, list) or sum(sizes) < tokens:
                return f"{tokens} tokens do not fit into {sizes!r:.60}"
        return None

    return examine("plan", {
        "the batches have room for all tokens": covers,
        "a prompt of exactly one batch": lambda: as_engine(range(64, 65), BATCHES),
        "one more than a batch: 65 tokens": lambda: as_engine(range(65, 66), BATCHES),
        "every length to 600, as the engine does it": lambda: as_engine(range(1, 600), BATCHES),
        "other sizes: 32, 4, 1": lambda: as_engine(range(1, 100), (32, 4, 1)),
    })


def check_top_p(yours: Callable[[np.ndarray, float], np.ndarray]) -> bool:
    """(probabilities, p) -> the same, cut to the fewest that weigh at least p together, summing to 1."""
    def case(probs: list[float], p: float, wanted: list[float]) -> str | None:
        got = yours(np.array(probs), p)
        if not isinstance(got, np.ndarray) or got.shape != (len(wanted),):
            return f"expected an array of {len(wanted)} numbers, got {got!r:.60}"
        if np.abs(got - wanted).max() < 1e-6:
            return None
        if len(probs) > 5:
            return (f"expected {np.count_nonzero(wanted)} tokens to be left, with {np.max(wanted):.3f} at most; "
                    f"you left {np.count_nonzero(got)}, with {got.max():.3f}")
        return f"of {probs} at p = {p}: expected {np.round(wanted, 3).tolist()}, got {np.round(got, 3).tolist()}"

    def many() -> str | None:
        probs = np.random.default_rng(0).dirichlet(np.full(50, 0.3))
        order = np.argsort(-probs)
        kept = order[:int((np.cumsum(probs[order]) < 0.9).sum()) + 1]
        wanted = np.zeros(50)
        wanted[kept] = probs[kept] / probs[kept].sum()
        return case(probs.tolist(), 0.9, wanted.tolist())

    return examine("top_p", {
        "0.5 needs only the first": lambda: case([.6, .3, .1], .5, [1, 0, 0]),
        "0.7 needs two": lambda: case([.6, .3, .1], .7, [2 / 3, 1 / 3, 0]),
        "they need not be sorted": lambda: case([.1, .6, .3], .7, [0, 2 / 3, 1 / 3]),
        "1 cuts nothing": lambda: case([.5, .25, .25], 1.0, [.5, .25, .25]),
        "fifty tokens, 0.9": many,
    })


def check_bits(yours: Callable[[np.ndarray, list[int]], float]) -> bool:
    """(logits (tokens, vocab), ids (tokens + 1,)) -> mean bits: minus the logarithm of what each next id was given."""
    rng = np.random.default_rng(0)
    logits, ids = rng.standard_normal((6, 20)) * 3, rng.integers(0, 20, 7).tolist()
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    wanted = float(np.mean([-np.log2(probs[t, ids[t + 1]]) for t in range(6)]))

    def number(logits: np.ndarray, ids: list[int]) -> object:
        got = yours(logits, ids)
        return float(got) if isinstance(got, np.floating) else got
    return examine("bits", {
        "no idea: 16 equal logits cost 4 bits each": lambda: expects(number(np.zeros((3, 16)), [1, 2, 3, 4]), 4.0),
        "sure and right: no bits": lambda: _near_zero(number(np.eye(4) * 100.0, [3, 0, 1, 2, 3])),
        "six tokens of 20": lambda: expects(number(logits, ids), wanted),
        "logits may be large: only differences count": lambda: expects(number(logits + 2000.0, ids), wanted),
    })


def _near_zero(got) -> str | None:
    wrong = expects(got, 0.0)
    return None if wrong is None or (isinstance(got, float) and abs(got) < 1e-6) else wrong


def check_gain_without_copies(yours: Callable[[Step], float]) -> bool:
    """A timed step -> how many times faster it would be if its copies took no time."""
    def step(*calls: tuple[float, bool]) -> Step:
        return Step([Call("k", "kernel", 8, 0, copy) for _, copy in calls], [seconds for seconds, _ in calls])
    return examine("gain_without_copies", {
        "half of the time is copying": lambda: expects(yours(step((1e-3, True), (1e-3, False))), 2.0),
        "nothing is copied": lambda: expects(yours(step((1e-3, False), (2e-3, False))), 1.0),
        "many short copies, one long kernel": lambda: expects(yours(step(*[(1e-6, True)] * 100, (4e-4, False))), 1.25),
    })
