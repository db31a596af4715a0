"""Checks of chapter 08's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from checks import examine
from minillama.measure import counts_of


def check_mixed(yours: Callable[[Tensor, Tensor, Tensor], Tensor]) -> bool:
    """(q, k, v), each (heads, tokens, dim) -> causal attention without a softmax, (heads, tokens, dim), no copies."""
    def inputs(heads: int, tokens: int, dim: int) -> list[Tensor]:
        rng = np.random.default_rng(tokens)
        return [Tensor(rng.standard_normal((heads, tokens, dim), dtype=np.float32)).realize() for _ in range(3)]

    def values(*shape: int) -> str | None:
        q, k, v = inputs(*shape)
        got = yours(q, k, v)
        if not isinstance(got, Tensor) or got.shape != shape:
            what = f"one of shape {got.shape}" if isinstance(got, Tensor) else f"{got!r:.60}"
            return f"q, k, v of shape {shape}: expected a tensor of that shape, got {what}"
        wanted = np.tril(q.numpy() @ k.numpy().transpose(0, 2, 1) * shape[-1] ** -0.5) @ v.numpy()
        off = np.abs(got.numpy() - wanted).max()
        return None if off < 1e-3 else f"q, k, v of shape {shape}: off by {off:.3g}"

    def no_copies() -> str | None:
        q, k, v = inputs(4, 64, 32)
        got = yours(q, k, v)
        if not isinstance(got, Tensor):
            return f"expected a tensor, got {got!r:.60}"
        counts = counts_of(lambda: yours(q, k, v).realize())
        if counts.copies:
            return f"4 heads, 64 tokens, dim 32: {counts.kernels} kernels, {counts.copies} of them a copy"
        return None if counts.kernels <= 2 else f"no copies, but {counts.kernels} kernels: two products need two"

    return examine("mixed", {
        "the values, 1 head": lambda: values(1, 4, 8),
        "the values, 4 heads": lambda: values(4, 64, 32),
        "two kernels, no copy": no_copies,
    })


def check_commutes(yours: Callable[[Callable[[np.ndarray], np.ndarray]], bool]) -> bool:
    """f -> whether f(repeated rows) is f(rows), repeated."""
    def softmax(x: np.ndarray, axis: int | None) -> np.ndarray:
        e = np.exp(x - x.max(axis=axis, keepdims=True))
        return e / e.sum(axis=axis, keepdims=True)

    functions: dict[str, tuple[Callable[[np.ndarray], np.ndarray], bool]] = {
        "every row to length 1": (lambda x: x / np.sqrt((x * x).sum(1, keepdims=True)), True),
        "a softmax over each row": (lambda x: softmax(x, 1), True),
        "a softmax over everything": (lambda x: softmax(x, None), False),
        "the columns turned round": (lambda x: x[:, ::-1], True),
        "running sums down the rows": (lambda x: np.cumsum(x, axis=0), False),
        "the rows' number added": (lambda x: x + np.arange(len(x))[:, None], False),
        "minus the mean of all rows": (lambda x: x - x.mean(axis=0), True),
        "minus the sum of all rows": (lambda x: x - x.sum(axis=0), False),
    }

    def case(name: str) -> str | None:
        f, wanted = functions[name]
        got = yours(f)
        if not isinstance(got, (bool, np.bool_)):
            what = f"an array of shape {got.shape}" if isinstance(got, np.ndarray) else f"{got!r:.60}"
            return f"expected one True or False, got {what}"
        return None if got == wanted else f"expected {wanted}, got {bool(got)}"
    return examine("commutes", {name: lambda name=name: case(name) for name in functions})


def check_reads_to_pay(yours: Callable[[float, float, float], int]) -> bool:
    """(copy, strided, tidy), seconds -> the fewest reads for which copying first is faster; 0 if it never is."""
    def case(copy: float, strided: float, tidy: float, wanted: int) -> str | None:
        got = yours(copy, strided, tidy)
        if not isinstance(got, int) or isinstance(got, bool):
            return f"expected a whole number, an int, got {got!r:.60}"
        said = f"copy {copy:g} s, strided {strided:g} s, tidy {tidy:g} s"
        return None if got == wanted else f"{said}: expected {wanted}, got {got}"
    return examine("reads_to_pay", {
        "it pays at once": lambda: case(1, 4, 2, 1),
        "after a few": lambda: case(5, 4, 2, 3),
        "exactly even is not faster yet": lambda: case(4, 4, 2, 3),
        "a strided read is as fast: never": lambda: case(1, 2, 2, 0),
        "a strided read is faster: never": lambda: case(1, 1, 3, 0),
        "nearly as fast: after very many": lambda: case(1000, 3, 2.5, 2001),
    })
