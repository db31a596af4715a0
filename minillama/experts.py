"""Mixture of experts: a router picks a few of many small networks for each token; one shared expert sees every token.

Two forms of the routed part, `dense` (all experts for all tokens, most multiplied by 0) and `gathered` (only those
picked, by index), take the same arguments and are equal. Source: Shazeer et al. 2017; llama.cpp #16095.
"""
from tinygrad import Tensor, dtypes

from minillama.config import ModelConfig
from minillama.kernels import gemm, gemm_experts, groups, halves, panel_experts, product, router, tuning
from minillama.kernels.cores import on_cpu
from minillama.kernels.packed import Packed, unpacked
from minillama.kernels.product import Normed
from minillama.layers import linear, project, swiglu
from minillama.weights import ExpertWeights


def route(x: Tensor, router: Tensor, used: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the `used` most probable experts. x (tokens, hidden), router (experts, hidden).

    Returns ids (tokens, used) int32, most probable first; probs (tokens, used), summing to 1; and the softmax over all
    experts (tokens, experts), which training balances. The best are found by rank: expert i is at place
    #{j: p_j > p_i}, ties going to the smaller index. That is experts² comparisons a token, and no sort.
    """
    every = linear(x, router).softmax(-1).contiguous()                      # (tokens, experts)
    experts = every.shape[-1]
    index = Tensor.arange(experts)
    mine, other = every.unsqueeze(-1), every.unsqueeze(-2)
    ahead = (other > mine) | ((other == mine) & (index.reshape(1, experts) < index.reshape(experts, 1)))
    rank = ahead.sum(axis=-1, dtype=dtypes.int32).contiguous()              # (tokens, experts)
    at = rank.unsqueeze(1) == Tensor.arange(used).reshape(1, used, 1)       # (tokens, used, experts)
    ids = at.where(index.cast(dtypes.int32), 0).sum(axis=-1).cast(dtypes.int32)
    probs = at.where(every.unsqueeze(1), 0).sum(axis=-1)
    return ids, probs / probs.sum(axis=-1, keepdim=True), every


def dense(x: Tensor, w: ExpertWeights, ids: Tensor, probs: Tensor) -> Tensor:
    """Every expert for every token. x (tokens, hidden), ids and probs (tokens, used); returns (tokens, hidden).

    All experts side by side are one wide SwiGLU network; a token's shares scale its columns, most of them by 0.
    """
    experts, hidden, width = w.down.shape
    down = plain(w.down)
    chosen = ids.unsqueeze(-1) == Tensor.arange(experts)                    # (tokens, used, experts)
    share = chosen.where(probs.unsqueeze(-1), 0).sum(axis=1)                # (tokens, experts)
    gate, up = (linear(x, plain(weight).reshape(experts * width, hidden)) for weight in w.pair())
    y = swiglu(gate, up).reshape(-1, experts, width) * share.unsqueeze(-1)
    y = y.reshape(-1, experts * width).cast(down.dtype).contiguous()
    return linear(y, down.permute(1, 0, 2).reshape(hidden, experts * width))


def gathered(x: Tensor, w: ExpertWeights, ids: Tensor, probs: Tensor) -> Tensor:
    """Only the experts that were picked, by index. Arguments and result as `dense`."""
    if isinstance(w.down, Packed):
        return product.mixed(product.gated(x, *w.pair(), ids, probs), w.down, ids)
    rows = x.reshape(x.shape[0], 1, 1, x.shape[1])                          # (tokens, 1, 1, hidden)
    gate, up = ((rows * weight[ids]).sum(-1) for weight in w.pair())        # (tokens, used, width) each
    y = (swiglu(gate, up) * probs.unsqueeze(-1)).contiguous()
    return (y.unsqueeze(2) * w.down[ids]).sum(-1).sum(1)                    # (tokens, hidden)


def grouped(x: Tensor, w: ExpertWeights, ids: Tensor, probs: Tensor) -> Tensor:
    """As `gathered`, but tokens that picked the same expert share one reading of it. Arguments, result as `dense`."""
    if not isinstance(w.down, Packed):
        return gathered(x, w, ids, probs)       # plain weights have no kernel for it
    return groups.experts(x, *w.pair(), w.down, groups.group(ids, w.down.shape[0]), probs)


def plain(weight: Tensor | Packed) -> Tensor:
    """A weight's values: its own, or unpacked into a buffer."""
    return unpacked(weight).reshape(weight.shape) if isinstance(weight, Packed) else weight


def experts_layer(x: Tensor, w: ExpertWeights, config: ModelConfig, routed, residual: Tensor | None = None,
                  ) -> tuple[Tensor, Tensor | None, Tensor]:
    """Routed experts plus the gated shared expert, plus `residual`. x (..., hidden); `routed`: one of the forms above.

    Returns y (..., hidden), and for training the router's softmax (tokens, experts; None where weights are packed) and
    choice (tokens, used).
    """
    rows = x.reshape(-1, config.hidden)                                     # (tokens, hidden)
    if isinstance(w.router, Packed):
        (ids, probs), every = router.route(linear(rows, w.router), config.experts_used), None
    else:
        ids, probs, every = route(rows, w.router, config.experts_used)
    y = routed(rows, w, ids, probs)
    share = (rows * w.shared_gate).sum(axis=-1, keepdim=True).sigmoid()     # (tokens, 1)
    if in_tiles(rows, w):
        gate, up = w.shared_inputs
        h = gemm_experts.gated(halves.halves(rows, gate.layout), gate, up, w.shared_down.layout, share.reshape(-1))
        y = gemm.linear(h, w.shared_down, y)
    elif in_panels(rows, w):
        h = panel_experts.shared_gated(rows, *w.shared_inputs, share.reshape(-1))
        y = linear(h, w.shared_down, y)
    else:
        gate, up = project(rows, w.shared_inputs, (config.shared_width, config.shared_width))
        y = y + linear(swiglu(gate, up), w.shared_down) * share
    y = y.reshape(x.shape)
    return y if residual is None else y + residual, every, ids


def in_panels(x: Tensor, w: ExpertWeights) -> bool:
    """Whether its first half is one kernel that multiplies panels of weights (`panel_experts.py`)."""
    return on_cpu(x.device) and len(w.shared_inputs) == 2 and all(
        isinstance(weight, Packed) for weight in (*w.shared_inputs, w.shared_down))


def in_tiles(x: Tensor, w: ExpertWeights) -> bool:
    """Whether the shared expert of many tokens is a product of tiles (`gemm_experts.py`). x (tokens, hidden)."""
    weights = *w.shared_inputs, w.shared_down
    return tuning.uses_mma(x.device) and x.shape[0] % 8 == 0 and len(weights) == 3 and all(
        isinstance(weight, Packed) for weight in weights) and halves.fits(*w.shared_inputs) and halves.fits(
        w.shared_down)


def few_tokens(x: Tensor | Normed, w: ExpertWeights, config: ModelConfig, residual: Tensor) -> Tensor:
    """`experts_layer` with packed weights for a few tokens, in six kernels: the router's product, its choice, both
    expert networks' first and second halves. x, residual and result (tokens, hidden).

    In four, where sizes allow it: with an expert for each row of the shared one's weights, the router's product is
    made on the way; and an expert as wide as all others is added up together with them.
    """
    gate, up = w.shared_inputs
    if gate.shape == w.router.shape:
        shared, logits, *normed = product.shared_gated(x, gate, up, w.shared_gate, w.router)
    else:
        shared, *normed = product.shared_gated(x, gate, up, w.shared_gate)  # (tokens, shared_width)
        logits = linear(x, w.router)                                        # (tokens, experts)
    x = normed[0] if normed else x                                          # (tokens, hidden)
    ids, best = router.choose(logits, config.experts_used)
    routed = product.gated(x, *w.pair(), ids, best, logits=True)            # (tokens, used, width)
    if w.shared_down.shape == w.down.shape[1:] and tuning.unrolled(x.device, config.experts_used):
        return product.mixed(routed, w.down, ids, residual, (shared, w.shared_down))
    return product.mixed(routed, w.down, ids, product.linear(shared, w.shared_down, residual))
