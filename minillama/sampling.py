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

    def draws(self, count: int, start: int = 0) -> list[float]:
        """Uniform numbers in [0, 1) that float32 holds, for a text's tokens start..start + count: a stream a seed."""
        return np.random.default_rng(self.seed).random(start + count, dtype=np.float32)[start:].tolist()


def greedy(logits: Tensor) -> Tensor:
    """The most probable id, the smallest of equals. logits (vocab,); returns (1,) int32."""
    return logits.argmax().reshape(1).cast(dtypes.int32)


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
        weighs = (bits >= tries).where(weight, 0).sum(axis=1)               # (16,): descending
        digit = (weighs >= goal).sum(dtype=dtypes.uint32).maximum(1) - 1
        found = (found + digit.cast(dtypes.uint32) * (1 << shift)).contiguous()
    return found.bitcast(dtypes.float32)


def cut(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Probabilities (vocab,) after temperature, then top-k, then top-p, summing to 1; settings are float32 (1,).

    Ties with the last entry kept are kept too. Source: Holtzman et al. 2019 (top-p).
    """
    probs = (logits / temperature).softmax().contiguous()
    kept = (top_k > 0).where(top_k, probs.shape[0])
    probs = (probs >= threshold(probs, Tensor.ones_like(probs), kept)).where(probs, 0)
    probs = (probs / probs.sum()).contiguous()
    nucleus = (probs >= threshold(probs, probs, top_p)).where(probs, 0)
    probs = (top_p < 1).where(nucleus, probs)
    return (probs / probs.sum()).contiguous()


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """The id where the cumulative distribution passes `uniform` (1,) in [0, 1). probs (vocab,); returns (1,) int32."""
    total = probs.cumsum().contiguous()
    ids = Tensor.arange(probs.shape[0])
    last = (probs > 0).where(ids, 0).max()
    reached = (total > uniform * total[-1]) & (probs > 0)       # rounding must not choose what was cut
    return reached.where(ids, last).min().reshape(1).cast(dtypes.int32)
