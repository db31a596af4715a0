"""Solutions of chapter 08's exercises."""
import math
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor


def mixed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The last product the other way round: its result is written as it is wanted."""
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).tril().contiguous()    # (heads, tokens, tokens)
    return (scores @ v).realize()


def commutes(f: Callable[[np.ndarray], np.ndarray]) -> bool:
    """Random rows, all different: then only a function that treats copies of a row alike passes."""
    x = np.random.default_rng(0).standard_normal((5, 4))
    return bool(np.allclose(f(np.repeat(x, 3, axis=0)), np.repeat(f(x), 3, axis=0)))


def reads_to_pay(copy: float, strided: float, tidy: float) -> int:
    """Each read saves `strided - tidy`: the first whole number beyond copy / that."""
    saved = strided - tidy
    return math.floor(copy / saved) + 1 if saved > 0 else 0
