"""The multi-token-prediction block: one extra layer that guesses the token after next.

At position p it reads the embedding of token p + 1 and the model's hidden state of position p, taken after the last
norm (#23198 passed the state before that norm and acceptance fell; #24025 put it right). The model's head turns its
output into logits for token p + 2. Source: DeepSeek-V3 report, section 2.2; llama.cpp #22673.
"""
from tinygrad import Tensor, UOp

from minillama.attention import attention, remember
from minillama.config import ModelConfig
from minillama.experts import experts_layer
from minillama.kernels.packed import Packed
from minillama.layers import linear, lookup, rms_norm
from minillama.state import KVChain
from minillama.weights import AttentionWeights, MTPWeights, Weight


def mtp_input(ids: Tensor, hidden: Tensor, w: MTPWeights, config: ModelConfig, norm=rms_norm) -> Tensor:
    """Join what the block reads: ids (tokens, ...) of positions p + 1, hidden (tokens, ..., hidden) of positions p.
    Returns (tokens, ..., hidden). `norm`: the form of the RMS norm."""
    embedded = norm(lookup(w.embed, ids), w.embed_norm, config.norm_eps)
    return linear(embedded.cat(norm(hidden, w.hidden_norm, config.norm_eps), dim=-1), w.project)


def mtp_block(ids: Tensor, hidden: Tensor, w: MTPWeights, config: ModelConfig, routed, table: Tensor,
              start: int | UOp = 0, cache=None) -> tuple[Tensor, Tensor, Tensor]:
    """The block's normed output (tokens, ..., hidden), then the router's softmax and choice as `experts_layer` does.

    `linear(output, w.head)` are its logits; when the block drafts one token more, its output takes the hidden state's
    place. Arguments as `mtp_input` and `attention`.
    """
    x = mtp_input(ids, hidden, w, config)
    layer = w.layer
    x = x + attention(rms_norm(x, layer.norm, config.norm_eps), layer.mixer, config, table, start, cache)
    y, every, chosen = experts_layer(rms_norm(x, layer.post_norm, config.norm_eps), layer.experts, config, routed)
    return rms_norm(x + y, w.out_norm, config.norm_eps), every, chosen


def kv_rows(w: AttentionWeights, config: ModelConfig) -> tuple[Weight, ...]:
    """A copy of the rows that make keys and values, (2 * kv_heads * head_dim, hidden) in one weight or more: what the
    block runs of itself for a prompt."""
    first, found = 2 * config.heads * config.head_dim, []
    for weight in w.inputs:
        skipped, rows = min(first, weight.shape[0]), weight.shape[0]
        first -= skipped
        if skipped < rows and isinstance(weight, Packed):
            arrays = tuple(array[skipped:].contiguous().realize() for array in weight.arrays)
            found.append(Packed(weight.format, (rows - skipped, weight.columns), arrays))
        elif skipped < rows:
            found.append(weight[skipped:].contiguous().realize())
    return tuple(found)


def remember_tokens(ids: Tensor, hidden: Tensor, w: MTPWeights, kv: tuple[Weight, ...], config: ModelConfig,
                    table: Tensor, at, cache: KVChain, norm=rms_norm) -> None:
    """All that the block must keep of tokens it does not guess after: their keys and values. No query, no attention,
    no experts, no head. ids, hidden and norm as `mtp_input`; kv: `kv_rows`; the rest as `remember`."""
    x = mtp_input(ids, hidden, w, config, norm)
    remember(norm(x, w.layer.norm, config.norm_eps), w.layer.mixer, kv, config, table, at, cache)
