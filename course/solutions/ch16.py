"""Solutions of chapter 16's exercises."""
import math

import numpy as np


def rows_computed(block: int, blocks: int, tokens: int) -> list[bool]:
    """The next block makes keys and values of every row of this one's output; behind the last is only the draft."""
    last = block == blocks - 1
    return [not last or row == tokens - 1 for row in range(tokens)]


def block_rows(ids: np.ndarray, hidden: np.ndarray, following: int | None):
    """A row can be read once the token behind it is known. A prompt of one token has no such row."""
    next_ids = [*ids[1:].tolist(), *([] if following is None else [following])]
    return (np.array(next_ids), hidden[:len(next_ids)]) if next_ids else None


def answer_needed(prompt: int, extra: float, plain: float, turn: float, accepted: float) -> float:
    """What the prompt costs more, over what a token of the answer saves."""
    gain = plain - turn / (1 + accepted)
    return prompt * extra / gain if gain > 0 else math.inf
