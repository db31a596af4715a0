"""The router's choice in two kernels: every expert's rank, which is where the best ones are put; then their shares.
(For a few tokens, `product.gated` works the shares out by itself.)

The softmax over all experts is never made: shares are renormalised over the chosen, so the others' terms cancel.
"""
from tinygrad import Tensor, dtypes
from tinygrad.uop.ops import KernelInfo, UOp

from minillama.kernels import tuning
from minillama.kernels.block import const
from minillama.kernels.sums import added, counter


def route_twin(logits: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """logits (tokens, experts) -> ids (tokens, used) int32, most probable first, the smaller of equals before the
    other; probs (tokens, used): their softmax, renormalised to sum 1."""
    tokens, experts = logits.shape
    index = Tensor.arange(experts)
    mine, other = logits.unsqueeze(2), logits.unsqueeze(1)
    ahead = (other > mine) | ((other == mine) & (index.reshape(1, experts) < index.reshape(experts, 1)))
    chosen = ahead.sum(-1).unsqueeze(1) == Tensor.arange(used).reshape(1, used, 1)     # (tokens, used, experts)
    best = chosen.where(logits.unsqueeze(1), 0).sum(-1)
    return chosen.where(index, 0).sum(-1).cast(dtypes.int32), best.softmax(-1)


def choose(logits: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """The chosen and their logits, (tokens, used) each. Each expert's rank is counted; those below `used` are the
    places of the chosen."""
    tokens, experts = logits.shape
    opts = tuning.ranks(logits.device, tokens, experts)

    def kernel(ids: UOp, best: UOp, logits: UOp) -> UOp:
        expert, token, other = UOp.range(experts, 0), UOp.range(tokens, 1), counter(experts, 2)
        mine, theirs = logits.index(token, expert).load(), logits.index(token, other).load()
        ahead = (mine < theirs) | (mine.eq(theirs) & (other < expert))
        rank = added(ahead.cast(dtypes.int32), other)
        place = rank.cast(dtypes.weakint).valid(rank < used)    # elsewhere nothing is written
        stores = ids.index(token, place).store(expert.cast(dtypes.int32)), best.index(token, place).store(mine)
        return UOp.group(*stores).end(expert, token).sink(
            arg=KernelInfo(f"route_{tokens}_{used}_{experts}", opts_to_apply=opts))

    empty = {"device": logits.device}
    ids, best = (Tensor.empty(tokens, used, dtype=dtype, **empty) for dtype in (dtypes.int32, dtypes.float32))
    return tuple(ids.custom_kernel(best, logits, fxn=kernel)[:2])


def route(logits: Tensor, used: int) -> tuple[Tensor, Tensor]:
    """As the twin."""
    ids, best = choose(logits, used)
    tokens = ids.shape[0]

    def shares(probs: UOp, best: UOp) -> UOp:
        token = UOp.range(tokens, 0)
        sizes = [(best.index(token, const(n)).load() - best.index(token, const(0)).load()).exp() for n in range(used)]
        total = sum(sizes)
        return UOp.group(*(probs.index(token, const(n)).store(size / total) for n, size in enumerate(sizes))).end(
            token).sink(arg=KernelInfo(f"shares_{tokens}_{used}", opts_to_apply=()))
    return ids, Tensor.empty(tokens, used, dtype=dtypes.float32, device=best.device).custom_kernel(best, fxn=shares)[0]
