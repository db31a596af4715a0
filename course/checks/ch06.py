"""Checks of chapter 06's exercises."""
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from tinygrad import Tensor

from checks import examine, expects
from minillama.experts import dense, route
from minillama.weights import ExpertWeights

EXPERTS, USED, HIDDEN, WIDTH = 6, 2, 8, 5


def check_distinct_experts(yours: Callable[[int, int, int], float]) -> bool:
    """(experts, used, tokens) -> how many different experts a batch asks, on average, when each token picks freely."""
    def simulated() -> str | None:
        rng = np.random.default_rng(0)
        batches = [{int(e) for _ in range(8) for e in rng.permutation(16)[:4]} for _ in range(2000)]
        return expects(yours(16, 4, 8), float(np.mean([len(batch) for batch in batches])), 5e-3)

    return examine("distinct_experts", {
        "one token asks those it picked: 4 of 16": lambda: expects(yours(16, 4, 1), 4),
        "two tokens, 4 of 16: on average one is picked twice": lambda: expects(yours(16, 4, 2), 7),
        "where every token asks all, all are asked": lambda: expects(yours(8, 8, 3), 8),
        "eight tokens, 4 of 16: drawn two thousand times": simulated,
        "the 80B: 64 tokens, 10 of 512": lambda: expects(yours(512, 10, 64), 512 * (1 - (502 / 512) ** 64)),
    })


def _probs(rows: list[list[float]]) -> Tensor:
    return Tensor(rows).realize()


def check_fewer(yours: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> bool:
    """(ids, probs, used) -> the first `used` of both, weights summing to 1 again."""
    ids, probs = Tensor([[3, 1, 0], [2, 5, 4]], dtype="int32").realize(), _probs([[.5, .3, .2], [.4, .4, .2]])

    def case(used: int) -> str | None:
        got = yours(ids, probs, used)
        if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, Tensor) for part in got):
            return f"expected two tensors, ids and probs, got {got!r:.60}"
        few, weights = got[0].numpy(), got[1].numpy()
        if few.shape != (2, used) or weights.shape != (2, used):
            return f"expected two of shape (2, {used}), got {few.shape} and {weights.shape}"
        if (few != ids.numpy()[:, :used]).any():
            return f"the most probable come first in ids {ids.numpy().tolist()}; you kept {few.tolist()}"
        wanted = probs.numpy()[:, :used] / probs.numpy()[:, :used].sum(axis=1, keepdims=True)
        off = np.abs(weights - wanted).max()
        return None if off < 1e-6 else f"expected weights {wanted.round(3).tolist()}, got {weights.round(3).tolist()}"

    return examine("fewer", {"all three: nothing changes": lambda: case(3), "two of three": lambda: case(2),
                             "one: its weight is 1": lambda: case(1)})


def check_imbalance(yours: Callable[[np.ndarray, np.ndarray], float]) -> bool:
    """(every (tokens, experts), ids (tokens, used)) -> experts * sum of (share of the picks) * (mean probability)."""
    even = np.full((4, 4), 0.25)
    one = np.tile([0.7, 0.1, 0.1, 0.1], (4, 1))
    rng = np.random.default_rng(1)
    every = rng.dirichlet(np.ones(6), 10)
    ids = np.argsort(-every, axis=1)[:, :2]
    wanted = 6 * sum((ids == e).mean() * every[:, e].mean() for e in range(6))
    return examine("imbalance", {
        "four experts, each asked once, all equally probable": lambda: expects(
            _number(yours(even, np.array([[0], [1], [2], [3]]))), 1.0),
        "one expert of four is always asked, at 0.7": lambda: expects(_number(yours(one, np.zeros((4, 1), int))), 2.8),
        "ten tokens, 2 of 6 experts": lambda: expects(_number(yours(every, ids)), wanted),
    })


def _number(value) -> object:
    return float(value) if isinstance(value, (np.floating, np.ndarray)) and np.ndim(value) == 0 else value


def _weights() -> ExpertWeights:
    rng = np.random.default_rng(2)

    def made(*shape: int) -> Tensor:
        return Tensor((rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32)).realize()
    return ExpertWeights(made(EXPERTS, HIDDEN), (made(EXPERTS, WIDTH, HIDDEN), made(EXPERTS, WIDTH, HIDDEN)),
                         made(EXPERTS, HIDDEN, WIDTH), made(HIDDEN), (made(WIDTH, HIDDEN), made(WIDTH, HIDDEN)),
                         made(HIDDEN, WIDTH))


def check_renumbered(yours: Callable[[ExpertWeights, list[int]], ExpertWeights]) -> bool:
    """(weights, order) -> the same layer with its experts in another order: new expert i is old expert order[i]."""
    w, order = _weights(), [4, 2, 0, 5, 1, 3]
    x = Tensor(np.random.default_rng(3).standard_normal((7, HIDDEN)).astype(np.float32)).realize()

    def out(weights: ExpertWeights) -> np.ndarray:
        ids, probs, _ = route(x, weights.router, USED)
        return dense(x, weights, ids, probs).numpy()

    def right_type() -> ExpertWeights | str:
        got = yours(replace(w), list(order))
        return got if isinstance(got, ExpertWeights) else f"expected ExpertWeights, got {got!r:.60}"

    def moved() -> str | None:
        got = right_type()
        if isinstance(got, str):
            return got
        pairs = {"router": (w.router, got.router), "down": (w.down, got.down)}
        pairs |= {f"gate_up[{i}]": (w.gate_up[i], got.gate_up[i]) for i in range(2)}
        for name, (old, new) in pairs.items():
            if not np.array_equal(new.numpy(), old.numpy()[order]):
                return f"{name}: row i is not the old row order[i]"
        return None

    def unchanged() -> str | None:
        got = right_type()
        if isinstance(got, str):
            return got
        off = np.abs(out(got) - out(w)).max()
        return None if off < 1e-5 else f"the layer's output changed by {off:.3g}"

    return examine("renumbered", {"every part that belongs to an expert has moved with it": moved,
                                  "the layer gives what it gave before": unchanged})
