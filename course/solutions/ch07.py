"""Solutions of chapter 07's exercises."""
import numpy as np

from minillama.show.steps import Step


def plan(tokens: int, sizes: tuple[int, ...]) -> list[int]:
    """The largest batch that gets at least half full, then on with what is left."""
    batches = []
    while tokens > 0:
        size = next((size for size in sizes if tokens > size / 2), sizes[-1])
        batches.append(size)
        tokens -= size
    return batches


def top_p(probs: np.ndarray, p: float) -> np.ndarray:
    """A token is kept if those ahead of it do not weigh p yet."""
    order = np.argsort(-probs)
    ahead = np.cumsum(probs[order]) - probs[order]
    kept = np.zeros_like(probs)
    kept[order] = np.where(ahead < p, probs[order], 0)
    return kept / kept.sum()


def bits(logits: np.ndarray, ids: list[int]) -> float:
    """The logarithm of the softmax, taken without an overflow."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_probs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return float(-log_probs[np.arange(len(logits)), ids[1:]].mean() / np.log(2))


def gain_without_copies(step: Step) -> float:
    """All of the time, over what is left of it."""
    left = sum(seconds for call, seconds in zip(step.calls, step.seconds, strict=True) if not call.copy)
    return sum(step.seconds) / left
