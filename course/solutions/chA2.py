"""Solutions of appendix A2's exercises."""
import math

import numpy as np


def rate_at(step: int, steps: int, warmup: int, peak: float) -> float:
    """Up in a line, down in half a cosine."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / (steps - warmup)
    return peak * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def windows(length: int, ahead: int) -> tuple[slice, slice]:
    """Each step ahead reads one token further, and learns the one behind that."""
    return slice(ahead, ahead + length), slice(ahead + 1, ahead + 1 + length)


def clipped(gradients: list[np.ndarray], most: float) -> list[np.ndarray]:
    """One factor for all, so that the direction stays."""
    length = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients))
    return [gradient * (most / length) for gradient in gradients] if length > most else gradients
