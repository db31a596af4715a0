"""The multi-token-prediction block: one extra layer that guesses the token after next.

At position p it reads the embedding of token p + 1 and the model's hidden state of position p, taken after the last
norm (#23198 passed the state before that norm and acceptance fell; #24025 put it right). The model's head turns its
output into logits for token p + 2. Source: DeepSeek-V3 report, section 2.2; llama.cpp #22673.
"""
from tinygrad import Tensor, UOp

from minillama.attention import attention
from minillama.config import ModelConfig
from minillama.experts import experts_layer
from minillama.layers import linear, lookup, rms_norm
from minillama.weights import MTPWeights


def mtp_input(ids: Tensor, hidden: Tensor, w: MTPWeights, config: ModelConfig) -> Tensor:
    """Join what the block reads: ids (tokens, ...) of positions p + 1, hidden (tokens, ..., hidden) of positions p.
    Returns (tokens, ..., hidden)."""
    embedded = rms_norm(lookup(w.embed, ids), w.embed_norm, config.norm_eps)
    return linear(embedded.cat(rms_norm(hidden, w.hidden_norm, config.norm_eps), dim=-1), w.project)


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
