"""Solutions of chapter 06's exercises."""
from dataclasses import replace

import numpy as np
from tinygrad import Tensor

from minillama.weights import ExpertWeights


def distinct_experts(experts: int, used: int, tokens: int) -> float:
    """A token leaves an expert alone with probability 1 - used / experts; all tokens do, with that to their power."""
    return experts * (1 - (1 - used / experts) ** tokens)


def fewer(ids: Tensor, probs: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """The most probable come first, so the first ones are the ones to keep."""
    kept = probs[:, :used]                                                  # (tokens, used)
    return ids[:, :used], kept / kept.sum(axis=-1, keepdim=True)


def imbalance(every: np.ndarray, ids: np.ndarray) -> float:
    """1 when all are asked equally often; the router lowers it by making busy experts less probable."""
    experts = every.shape[1]
    asked = np.bincount(ids.ravel(), minlength=experts) / ids.size          # (experts,): share of the picks
    return float(experts * (asked * every.mean(axis=0)).sum())


def renumbered(w: ExpertWeights, order: list[int]) -> ExpertWeights:
    """An expert is a row of the router and a matrix of each kind; they must move together."""
    ids = Tensor(order)
    return replace(w, router=w.router[ids], gate_up=tuple(part[ids] for part in w.gate_up), down=w.down[ids])
