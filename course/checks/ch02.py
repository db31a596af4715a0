"""Checks of chapter 02's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from checks import examine
from minillama.measure import Clocks, counts_of


def check_split_heads(yours: Callable[[int, int, int], tuple]) -> bool:
    """(tokens, heads, dim) -> shape, strides and offset of (heads, tokens, dim) in a buffer (tokens, heads * dim)."""
    def addressed(tokens: int, heads: int, dim: int) -> str | None:
        got = yours(tokens, heads, dim)
        if not isinstance(got, tuple) or len(got) != 3:
            return f"expected a tuple of shape, strides and offset, got {got!r}"
        shape, strides, offset = got
        if tuple(shape) != (heads, tokens, dim):
            return f"the shape should be {(heads, tokens, dim)}, is {tuple(shape)}"
        if len(strides) != 3:
            return f"three dimensions need three strides, not {strides!r}"
        right = np.arange(tokens * heads * dim).reshape(tokens, heads, dim).transpose(1, 0, 2)
        read = offset + np.tensordot(strides, np.indices(shape), axes=1)
        if np.array_equal(read, right):
            return None
        where = tuple(int(i) for i in np.argwhere(read != right)[0])
        return f"head, token, dimension {where} lies at address {right[where]}, not at {read[where]}"

    return examine("split_heads", {
        "one head: nothing moves": lambda: addressed(3, 1, 4), "2 tokens, 3 heads of 4": lambda: addressed(2, 3, 4),
        "5 tokens, 2 heads of 3": lambda: addressed(5, 2, 3),
        "16 heads of 256, as in the 80B": lambda: addressed(2, 16, 256),
    })


def check_scores(yours: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """q (tokens, dim), k (positions, dim) -> (tokens, positions): the starter's values in one kernel, no copies."""
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((rows, 64)).astype(np.float32) for rows in (8, 96))
    q, k = Tensor(a).realize(), Tensor(b).realize()

    def right() -> str | None:
        got, wanted = yours(q, k).numpy(), a @ b.T / 8
        if got.shape != wanted.shape:
            return f"expected the shape {wanted.shape}, got {got.shape}"
        off = float(np.abs(got - wanted).max())
        return None if off < 1e-5 else f"max |difference| is {off:.3g}"

    def counted() -> str | None:
        counts = counts_of(yours, q, k)
        if counts.kernels == 1 and not counts.copies:
            return None
        return f"{counts.kernels} kernels, {counts.copies} of them copies, {counts.bytes:,} bytes"

    return examine("scores", {"the values": right, "one kernel, no copy": counted})


def check_first_rows(yours: Callable[[], Callable[[Tensor, int], Tensor]]) -> bool:
    """() -> a captured function (x (16, 4), count) -> the sum of x's first `count` rows, (4,)."""
    numbers = np.arange(64, dtype=np.float32).reshape(16, 4)
    x = Tensor(numbers).realize()

    def followed(counts: list[int]) -> str | None:
        captured = yours()
        for call, count in enumerate(counts, 1):
            got, wanted = captured(x, count).numpy(), numbers[:count].sum(0)
            if not np.array_equal(got, wanted):
                return f"call {call}: the first {count} rows sum to {wanted}, not to {got}"
        return None

    def replayed() -> str | None:
        captured = yours()
        for count in (1, 2, 3):
            captured(x, count).numpy()
        with Clocks() as clocks:
            captured(x, 13).numpy()
        return "a number that is new made it compile again" if clocks.compile else None

    return examine("first_rows", {
        "the same number four times": lambda: followed([5, 5, 5, 5]),
        "1, 2, 3, ... 8": lambda: followed([*range(1, 9)]),
        "up and down: 16, 1, 9, 16, 2": lambda: followed([16, 1, 9, 16, 2]),
        "a number never seen compiles nothing": replayed,
    })


def check_replace(yours: Callable[[Tensor, Tensor, int], Tensor]) -> bool:
    """(cache (rows, width), row (1, width), at) -> the old row; the new one is in the cache, the others untouched."""
    numbers = np.arange(12, dtype=np.float32).reshape(6, 2)

    def one(at: int) -> str | None:
        cache, row = Tensor(numbers).realize(), Tensor([[70.0, 80.0]]).realize()
        old, wanted = yours(cache, row, at).numpy(), numbers.copy()
        wanted[at] = 70.0, 80.0
        if not np.array_equal(cache.numpy(), wanted):
            wrong = np.flatnonzero((cache.numpy() != wanted).any(axis=1))
            return f"rows {wrong.tolist()} of the cache are not what they should be"
        if not np.array_equal(old.reshape(-1), numbers[at]):
            return f"the old row was {numbers[at]}, you returned {old.reshape(-1)}"
        return None

    def twice() -> str | None:
        cache = Tensor(numbers).realize()
        first = yours(cache, Tensor([[70.0, 80.0]]).realize(), 2)
        second = yours(cache, Tensor([[1.0, 2.0]]).realize(), 2)
        got = [first.numpy().reshape(-1).tolist(), second.numpy().reshape(-1).tolist()]
        wanted = [[4.0, 5.0], [70.0, 80.0]]
        return None if got == wanted else f"the old rows were {wanted}; you gave {got}"

    return examine("replace", {"row 0": lambda: one(0), "row 3": lambda: one(3), "the last row": lambda: one(5),
                               "the same row twice, both old rows kept": twice})
