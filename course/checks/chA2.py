"""Checks of appendix A2's exercises."""
import math
from collections.abc import Callable

import numpy as np

from checks import examine, expects


def check_rate_at(yours: Callable[[int, int, int, float], float]) -> bool:
    """(step, steps, warmup, peak) -> the learning rate of that step."""
    def case(step: int, wanted: float) -> str | None:
        got = yours(step, 110, 10, 0.002)
        got = float(got) if isinstance(got, np.floating) else got
        complaint = expects(got, wanted)
        return complaint and f"step {step} of 110, warm-up over 10, peak 0.002: {complaint}"
    return examine("rate_at", {
        "the first step": lambda: case(0, 0.0002), "in the middle of the warm-up": lambda: case(4, 0.001),
        "the last step of the warm-up": lambda: case(9, 0.002), "the top of the cosine": lambda: case(10, 0.002),
        "half way down": lambda: case(60, 0.0011),
        "a quarter": lambda: case(35, 0.002 * (0.1 + 0.45 * (1 + math.cos(math.pi / 4)))),
        "the end": lambda: case(110, 0.0002)})


def check_windows(yours: Callable[[int, int], tuple[slice, slice]]) -> bool:
    """(length, ahead) -> slices of a window of length + 3 tokens: read, learnt."""
    def case(length: int, ahead: int) -> str | None:
        got = yours(length, ahead)
        if not isinstance(got, tuple) or len(got) != 2 or not all(isinstance(part, slice) for part in got):
            return f"expected two slices, got {got!r:.60}"
        text = list(range(length + 3))
        read, learnt = text[got[0]], text[got[1]]
        if read != text[ahead:ahead + length]:
            return f"{length} positions, ahead {ahead}: position 0 reads token {ahead}, not {read[:1]}; all read {read}"
        wanted = text[ahead + 1:ahead + 1 + length]
        return None if learnt == wanted else f"{length} positions, ahead {ahead}: expected {wanted}, got {learnt}"
    return examine("windows", {"the model": lambda: case(5, 0), "the block": lambda: case(5, 1),
                               "the block on its own output": lambda: case(5, 2), "one position": lambda: case(1, 2)})


def check_clipped(yours: Callable[[list[np.ndarray], float], list[np.ndarray]]) -> bool:
    """(gradients, largest length of all together) -> gradients."""
    def case(gradients: list[list[float]], most: float) -> str | None:
        given = [np.array(values) for values in gradients]
        length = math.sqrt(sum(float((values**2).sum()) for values in given))
        scale = min(1.0, most / length) if length else 1.0
        got = yours([values.copy() for values in given], most)
        if not isinstance(got, (list, tuple)) or len(got) != len(given):
            return f"expected {len(given)} arrays, got {got!r:.60}"
        if all(np.allclose(mine, scale * values, rtol=1e-4) for mine, values in zip(got, given, strict=True)):
            return None
        return f"length {length:.3g}, at most {most}: expected a factor of {scale:.3g} for all of {gradients}"
    return examine("clipped", {
        "too long": lambda: case([[3.0, 4.0]], 1.0), "short enough": lambda: case([[0.3, 0.4]], 1.0),
        "two arrays, one length": lambda: case([[3.0, 0.0], [4.0]], 2.5),
        "each short enough, together not": lambda: case([[0.8], [0.8]], 1.0),
        "all zero": lambda: case([[0.0, 0.0]], 1.0)})
