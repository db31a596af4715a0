"""From logits to one token id, on the device: greedy, temperature, top-k, top-p.

Both cuts are thresholds on the probabilities, found by search and not by sorting 150,000 entries; the draw inverts the
cumulative distribution at a uniform number which the host supplies, so that a seed gives the same text again.
"""
from dataclasses import dataclass

import numpy as np
from tinygrad import Tensor, dtypes

COLDEST = 1e-6      # below this temperature, logits divided by it overflow float32; the likeliest token wins anyway
DIGIT_BITS = 4      # a threshold is a 32-bit pattern, found 4 bits at a time: 8 reductions over the vocabulary


@dataclass(frozen=True)
class Sampler:
    """How the next token is chosen. temperature 0 is greedy; top_k 0 and top_p 1 cut nothing."""
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ValueError(f"top-k is {self.top_k}: it must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top-p is {self.top_p}: it must be above 0 and at most 1 (off)")

    @property
    def greedy(self) -> bool:
        return self.temperature < COLDEST

    def stream(self) -> np.random.Generator:
        """Where uniform numbers in [0, 1) come from, one a token: a stream a seed."""
        return np.random.default_rng(self.seed)


def parts(x: Tensor, neutral: float) -> Tensor:
    """(..., vocab) as (..., count, size), with `neutral` behind its end.

    The optimizer gives a reduction of one row to few threads: 128 of a GPU, each with a loop over 1,187 of 151,936
    entries. In two steps, with a buffer between them, it is two short kernels.
    """
    count = 512 if x.shape[-1] > 1 << 14 else 64
    size = -(-x.shape[-1] // (32 * count)) * 32         # a multiple of what threads like to share
    behind = count * size - x.shape[-1]
    return x.pad((*[None] * (x.ndim - 1), (0, behind)), value=neutral).reshape(*x.shape[:-1], count, size)


def total(x: Tensor) -> Tensor:
    """The sum over a vocabulary, (..., vocab) -> (...)."""
    return parts(x, 0).sum(-1).contiguous().sum(-1)


def largest(x: Tensor) -> Tensor:
    """The maximum over a vocabulary, (..., vocab) -> (...)."""
    return parts(x, float("-inf") if x.is_floating_point() else -1).max(-1).contiguous().max(-1)


def greedy(logits: Tensor) -> Tensor:
    """The most probable id of each row, the smallest of equals. logits (vocab,) or (rows, vocab); (rows,) int32."""
    logits = logits.reshape(-1, logits.shape[-1])                           # (rows, vocab)
    best = largest(logits).reshape(-1, 1).contiguous()
    behind = logits.shape[-1] - Tensor.arange(logits.shape[-1])             # vocab .. 1: the first is the largest
    ids = logits.shape[-1] - largest((logits == best).where(behind, 0))
    return ids.minimum(logits.shape[-1] - 1).cast(dtypes.int32)             # where all are NaN, an id all the same


def threshold(probs: Tensor, weight: Tensor, goal: Tensor) -> Tensor:
    """The largest t such that the entries with probs >= t weigh at least `goal` together; 0 if all weigh less.

    probs, weight (vocab,), probs >= 0; goal is a scalar tensor. Bit patterns of non-negative floats are ordered as the
    floats are, so t is found exactly, from its highest bits to its lowest.
    """
    bits = probs.bitcast(dtypes.uint32).reshape(1, -1)                      # (1, vocab)
    digits = Tensor.arange(1 << DIGIT_BITS, dtype=dtypes.uint32).reshape(-1, 1)
    found = Tensor.zeros(1, dtype=dtypes.uint32, device=probs.device)
    for shift in range(32 - DIGIT_BITS, -1, -DIGIT_BITS):
        tries = found + digits * (1 << shift)                               # (16, 1): ascending
        weighs = total((bits >= tries).where(weight, 0))                    # (16,): descending
        digit = (weighs >= goal).sum(dtype=dtypes.uint32).maximum(1) - 1
        found = (found + digit.cast(dtypes.uint32) * (1 << shift)).contiguous()
    return found.bitcast(dtypes.float32)


def cut(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities (vocab,) after temperature, then top-k, then top-p, summing to 1; settings are float32 (1,).

    Ties with the last entry kept are kept too. Source: Holtzman et al. 2019 (top-p).
    """
    scaled = logits / temperature
    probs = (scaled - largest(scaled)).exp().contiguous()
    probs = (probs / total(probs)).contiguous()
    kept = (top_k > 0).where(top_k, probs.shape[0])
    probs = (probs >= threshold(probs, Tensor.ones_like(probs), kept)).where(probs, 0)
    probs = (probs / total(probs)).contiguous()
    nucleus = (probs >= threshold(probs, probs, top_p)).where(probs, 0)
    probs = (top_p < 1).where(nucleus, probs)
    return (probs / total(probs)).contiguous()


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The id where the cumulative distribution passes `uniform` (1,) in [0, 1). probs (vocab,); returns (1,) int32."""
    reaches = probs.cumsum().contiguous()
    count, ids = probs.shape[0], Tensor.arange(probs.shape[0])
    last = largest((probs > 0).where(ids, 0))
    reached = (reaches > uniform * reaches[-1]) & (probs > 0)   # rounding must not choose what was cut
    return (count - largest(reached.where(count - ids, count - last))).reshape(1).cast(dtypes.int32)
