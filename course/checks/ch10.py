"""Checks of chapter 10's exercises."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor, UOp

from checks import examine
from minillama.measure import counts_of
from minillama.show.pruning import Kernel, kernel


def check_changing(yours: Callable[[list[Kernel], set[str]], list[Kernel]]) -> bool:
    """(kernels, inputs) -> those that must run at every replay."""
    steps = {
        "a product and a constant": ([kernel("scale", "w", "s"), kernel("product", "x w", "y"),
                                      kernel("times", "y s", "out")], "product times"),
        "a constant after a kernel that reads the same weight": (
            [kernel("product", "x w", "y"), kernel("norm", "w", "n"), kernel("times", "y n", "out")], "product times"),
        "nothing depends on x": ([kernel("a", "w", "t"), kernel("b", "t", "u")], ""),
        "a chain": ([kernel("a", "x", "t"), kernel("b", "t", "u"), kernel("c", "u w", "out")], "a b c"),
        "a state that a changing kernel wrote": (
            [kernel("write", "x", "state"), kernel("read", "state", "out"), kernel("table", "w", "t")], "write read"),
        "a constant in place of what a changing kernel wrote": (
            [kernel("write", "x", "t"), kernel("clear", "w", "t"), kernel("read", "t", "out")], "write clear read"),
    }

    def case(kernels: list[Kernel], wanted: str) -> str | None:
        got = yours(list(kernels), {"x"})
        if not isinstance(got, list) or not all(isinstance(k, Kernel) for k in got):
            return f"expected a list of kernels, got {got!r:.60}"
        names = " ".join(k.name for k in got)
        listed = ", ".join(f"{k.name}: {' '.join(sorted(k.reads))} -> {' '.join(k.writes)}" for k in kernels)
        return None if names == wanted else f"of [{listed}] expected [{wanted}], got [{names}]"
    return examine("changing", {name: lambda step=step: case(*step) for name, step in steps.items()})


def check_row_logits(yours: Callable[[Tensor, Tensor, UOp], Tensor]) -> bool:
    """(hidden (tokens, hidden), head (vocab, hidden), valid bound) -> logits of row valid - 1, (vocab,)."""
    rng, valid = np.random.default_rng(0), UOp.variable("valid", 1, 8)
    hidden, head = (rng.standard_normal(shape, dtype=np.float32) for shape in ((8, 32), (64, 32)))
    tensors = [Tensor(part).realize() for part in (hidden, head)]

    def case(rows: int) -> str | None:
        got = yours(*tensors, valid.bind(rows))
        if not isinstance(got, Tensor) or got.shape != (64,):
            what = f"one of shape {got.shape}" if isinstance(got, Tensor) else f"{got!r:.60}"
            return f"expected a tensor of shape (64,), got {what}"
        off = np.abs(got.numpy() - head @ hidden[rows - 1]).max()
        return None if off < 1e-4 else f"{rows} of 8 rows are text: off by {off:.3g} from row {rows - 1}'s logits"

    def counted() -> str | None:
        rows = counts_of(lambda: yours(*tensors, valid.bind(5)).realize()).ops / (2 * 64 * 32)
        return None if rows < 1.5 else f"8 rows of 32, a head of 64: {rows:.0f} rows were computed, one is read"
    return examine("row_logits", {"5 of 8 rows are text": lambda: case(5), "all 8 are": lambda: case(8),
                                  "one is": lambda: case(1), "only one row is computed": counted})


def check_rows_needed(yours: Callable[[str, int, int, int], int]) -> bool:
    """(part, layer, layers, tokens) -> rows that the part must compute in a prompt's batch."""
    def case(part: str, layer: int, wanted: int, layers: int = 8, tokens: int = 64) -> str | None:
        got = yours(part, layer, layers, tokens)
        if isinstance(got, int) and got == wanted:
            return None
        return f"{part}, layer {layer} of {layers}, {tokens} tokens: expected the int {wanted}, got {got!r:.40}"

    def last(*parts: str, wanted: int) -> str | None:
        return next(filter(None, (case(part, 7, wanted) for part in parts)), None)
    return examine("rows_needed", {
        "layer 3: the layers behind it read every row": lambda: next(filter(None, (
            case(part, 3, 64) for part in ("keys and values", "queries", "attention", "experts"))), None),
        "the last layer's keys and values: later batches read them": lambda: last("keys and values", wanted=64),
        "the last layer's queries, attention and experts": lambda: last("queries", "attention", "experts", wanted=1),
        "the head": lambda: last("head", wanted=1),
        "a model of one layer, 512 tokens": lambda: case("experts", 0, 1, 1, 512) or case("keys and values", 0, 512, 1,
                                                                                         512),
    })
