"""Perplexity: how surprised a model is by a text, in windows that each start from an empty state."""
from collections.abc import Callable

import numpy as np
from tinygrad import Tensor

from minillama.engine import Engine


def surprise(engine: Engine, ids: list[int]) -> float:
    """The sum of -ln p of each id but the first, given all before it, in nats. Works on the device: one number a token
    comes back, not one a vocabulary entry. The engine's state goes on from where it is."""
    following, total = ids[1:], 0.0
    for batch, start, valid, at in engine.batches_of(ids[:-1]):
        logits = engine.step("every", batch, start, valid)                      # (size, vocab)
        targets = np.zeros((batch.shape[0], 1), dtype=np.int32)
        targets[:valid, 0] = following[at:at + valid]
        chosen = logits.gather(1, Tensor(targets, device=engine.device)).reshape(-1)
        total += float((logits.logsumexp(axis=1) - chosen).numpy()[:valid].sum(dtype=np.float64))
    return total


def windowed_surprise(engine: Engine, ids: list[int], progress: Callable[[int, int], None]) -> float:
    """`surprise` of a text of any length. Each window feeds up to `engine.context` ids to a cleared state and predicts
    the id after each of them, so that every id but the first is predicted once. `progress` gets (done, all) ids."""
    if len(ids) < 2:
        raise ValueError(f"perplexity needs at least two tokens, the text has {len(ids)}")
    total, count = 0.0, len(ids) - 1
    for at in range(0, count, engine.context):
        progress(at, count)
        engine.clear()
        total += surprise(engine, ids[at:at + engine.context + 1])
    progress(count, count)
    return total
