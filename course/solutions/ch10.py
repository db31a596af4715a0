"""Solutions of chapter 10's exercises."""
from tinygrad import Tensor, UOp

from minillama.show.pruning import Kernel


def changing(kernels: list[Kernel], inputs: set[str]) -> list[Kernel]:
    """Only what a changing kernel writes makes its readers change."""
    changed, found = set(inputs), []
    for kernel in kernels:
        if changed & (kernel.reads | kernel.writes):
            found.append(kernel)
            changed |= kernel.writes
    return found


def row_logits(hidden: Tensor, head: Tensor, valid: UOp) -> Tensor:
    """Cut first, then multiply."""
    return hidden[valid - 1] @ head.T


def rows_needed(part: str, layer: int, layers: int, tokens: int) -> int:
    """All rows go on to the next layer or into the cache; of the last layer's output only the last row is read."""
    last = layer == layers - 1 and part != "keys and values"
    return 1 if last or part == "head" else tokens
