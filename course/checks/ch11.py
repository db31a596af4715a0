"""Checks of chapter 11's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, dtypes

from checks import examine
from checks.kernels import Kernel, NotAKernel, checked
from minillama.measure import counts_of


def _run(kernel: Kernel, size: int, *inputs: np.ndarray) -> tuple[np.ndarray, int]:
    """What a kernel fills a buffer of so many numbers with, and how many kernels that took."""
    tensors = [Tensor(part.astype(np.float32)).realize() for part in inputs]

    def once() -> Tensor:
        empty = Tensor.empty(size, dtype=dtypes.float32, device=tensors[0].device)
        return empty.custom_kernel(*tensors, fxn=kernel)[0].realize()
    return once().numpy(), counts_of(once).kernels


def _compared(got: np.ndarray, wanted: np.ndarray) -> str | None:
    off = np.abs(got - wanted)
    if np.isfinite(off).all() and off.max() < 1e-4:
        return None
    at = int(np.where(np.isfinite(off), off, np.inf).argmax())
    return f"at {at} expected {wanted[at]:.4g}, got {got[at]:.4g}"


def check_answer(yours: Kernel) -> bool:
    """A kernel (out (64,), memory (64, 64), query (64,), keep (1,)): out[c] = keep * sum of memory[:, c] * query."""
    rng = np.random.default_rng(0)

    def case(memory: np.ndarray, query: np.ndarray, keep: float) -> str | None:
        try:
            got, _ = _run(checked(yours), 64, memory, query, np.array([keep]))
        except NotAKernel as wrong:
            return str(wrong)
        return _compared(got, keep * memory.T @ query)

    return examine("answer", {
        "the identity, keep 1: the query itself": lambda: case(np.eye(64), np.arange(64.0), 1.0),
        "keep 0.5": lambda: case(np.eye(64), np.arange(64.0), 0.5),
        "rows are key dimensions: sum down the columns": lambda: case(np.triu(np.ones((64, 64))), np.ones(64), 1.0),
        "a random memory": lambda: case(rng.standard_normal((64, 64)), rng.standard_normal(64), 0.9),
    })


def check_row_sums(yours: Callable[[int, int, int], Kernel]) -> bool:
    """(first, row_step, column_step) -> a kernel (out (16,), x (512,)) that sums 16 rows of 8 numbers."""
    x = np.random.default_rng(0).standard_normal(512)

    def case(first: int, row_step: int, column_step: int) -> str | None:
        kernel = yours(first, row_step, column_step)
        if not callable(kernel):
            return f"expected a kernel, a function of (out, x), got {kernel!r:.40}"
        try:
            got, _ = _run(checked(kernel), 16, x)
        except NotAKernel as wrong:
            return str(wrong)
        at = first + np.arange(16)[:, None] * row_step + np.arange(8) * column_step
        off = _compared(got, x[at].sum(1))
        return off and f"first {first}, row_step {row_step}, column_step {column_step}: {off}"
    return examine("row_sums", {
        "tidy rows": lambda: case(0, 8, 1), "eight columns of a buffer that is 32 wide": lambda: case(4, 32, 1),
        "a transposed matrix": lambda: case(0, 1, 16), "the same row, sixteen times": lambda: case(40, 0, 1),
        "backwards": lambda: case(511, -8, -1),
    })


def check_from_sums(yours: Callable[..., tuple[float, float]]) -> bool:
    """Sums over a column of S with raw k and q, and v, keep, beta -> what is written (to be scaled by raw k), o."""
    rng = np.random.default_rng(0)

    def case(length_k: float, length_q: float) -> str | None:
        S, k, q = rng.standard_normal((3, 8))
        k, q = (part / np.linalg.norm(part) * length for part, length in ((k, length_k), (q, length_q)))
        v, keep, beta = 0.7, 0.9, 0.4
        unit_k, unit_q = k / length_k, q / length_q
        new = keep * S + unit_k * beta * (v - keep * S @ unit_k)
        got = yours(S @ k, S @ q, k @ k, q @ q, k @ q, v, keep, beta)
        if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, (int, float)) for part in got):
            return f"expected two numbers, write and o, got {got!r:.60}"
        lengths = f"|k| = {length_k}, |q| = {length_q}: "
        if abs(got[1] - new @ unit_q) > 1e-9:
            return f"{lengths}o should be {new @ unit_q:.6f}, not {got[1]:.6f}"
        off = np.abs(keep * S + k * got[0] - new).max()
        return None if off < 1e-9 else f"{lengths}keep · S + k · write is off by {off:.3g}"
    return examine("from_sums", {
        "both of length 1": lambda: case(1.0, 1.0), "a query of length 2": lambda: case(1.0, 2.0),
        "a key of length 3": lambda: case(3.0, 1.0), "short ones": lambda: case(0.25, 0.5),
    })
