"""Solutions of chapter 15's exercises."""
import numpy as np


def replayed(memory: np.ndarray, log: list[tuple[float, np.ndarray, np.ndarray]], accepted: int) -> np.ndarray:
    """What was written says it all: nothing has to be read from the memory again."""
    for keep, key, missing in log[:accepted + 1]:
        memory = keep * memory + np.outer(key, missing)
    return memory


def survivors(slots: int, drafts: int) -> list[int]:
    """Of the positions that share a slot, the last one's memory is there."""
    newest = {position % slots: position for position in range(drafts + 2)}
    return sorted(newest.values())


def history_rows(width: int, drafts: int) -> int:
    """From the width - 2 inputs before the round's first, which the second token sees, to the round's last input."""
    return (width - 2) + (drafts + 1)
