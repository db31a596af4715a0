"""Checks of chapter 15's exercises."""
from collections.abc import Callable

import numpy as np

from checks import examine


def check_replayed(yours: Callable[[np.ndarray, list, int], np.ndarray]) -> bool:
    """(memory before a round, its log of (keep, key, missing), accepted) -> memory of the text."""
    rng = np.random.default_rng(0)
    start = rng.standard_normal((8, 8))
    keys, values = rng.standard_normal((2, 4, 8))
    keeps = (0.9, 0.5, 1.0, 0.05)
    memories, log = [start], []
    for key, value, keep in zip(keys / np.linalg.norm(keys, axis=1, keepdims=True), values, keeps, strict=True):
        missing = (value - keep * memories[-1].T @ key) * 0.8
        log.append((keep, key, missing))
        memories.append(keep * memories[-1] + np.outer(key, missing))

    def case(accepted: int) -> str | None:
        given = start.copy()
        got, wanted = yours(given, list(log), accepted), memories[accepted + 1]
        if not isinstance(got, np.ndarray) or got.shape != wanted.shape:
            return f"expected an array {wanted.shape}, got {got!r:.60}"
        if not np.array_equal(given, start):
            return "the memory that was given has been changed: with it, a second round could not start over"
        off = np.abs(got - wanted).max()
        return None if off < 1e-9 else f"{accepted} of 3 drafts kept: off by {off:.3g}"
    return examine("replayed", {"none of 3 drafts was kept: one token stays": lambda: case(0),
                                "one was": lambda: case(1),
                                "two were": lambda: case(2), "all were": lambda: case(3)})


def check_survivors(yours: Callable[[int, int], list[int]]) -> bool:
    """(slots, drafts) -> the positions whose memories are in the ring after a round from position 0."""
    def case(slots: int, drafts: int) -> str | None:
        ring: list[int | None] = [0] + [None] * (slots - 1)
        for position in range(1, drafts + 2):
            ring[position % slots] = position
        wanted = sorted(held for held in ring if held is not None)
        got = yours(slots, drafts)
        if not isinstance(got, list):
            return f"expected a list of positions, got {got!r:.40}"
        return None if got == wanted else f"{slots} slots, {drafts} drafts: expected {wanted}, got {got!r:.60}"
    return examine("survivors", {
        "room for all": lambda: case(4, 2), "room to spare": lambda: case(7, 2),
        "one slot less than memories": lambda: case(3, 2), "two slots": lambda: case(2, 3),
        "one slot: written over and over": lambda: case(1, 3), "no drafts": lambda: case(2, 0)})


def smallest(width: int, drafts: int) -> int:
    """By trying: the least ring of inputs that serves a round from position 100 and whatever comes after it."""
    def serves(rows: int) -> bool:
        ring = {position % rows: position for position in range(101 - width, 100)}
        if len(ring) < width - 1:
            return False
        ring |= {position % rows: position for position in range(100, 101 + drafts)}
        return all(ring.get(position % rows) == position for end in range(101, 102 + drafts)
                   for position in range(end - width + 1, end))
    return next(rows for rows in range(1, 100) if serves(rows))


def check_history_rows(yours: Callable[[int, int], int]) -> bool:
    """(width, drafts) -> rows of the smallest ring of the convolution's inputs."""
    def case(width: int, drafts: int) -> str | None:
        got, wanted = yours(width, drafts), smallest(width, drafts)
        if isinstance(got, bool) or not isinstance(got, int):
            return f"expected a whole number, got {got!r:.40}"
        if got == wanted:
            return None
        what = "would overwrite an input that is still needed" if got < wanted else "is more than is needed"
        return f"width {width}, {drafts} drafts: {got} rows {what}"
    return examine("history_rows", {
        "a width of 4, no drafts": lambda: case(4, 0), "a width of 4, one draft": lambda: case(4, 1),
        "a width of 4, three drafts": lambda: case(4, 3), "a width of 2, two drafts": lambda: case(2, 2),
        "a width of 9, seven drafts": lambda: case(9, 7)})
