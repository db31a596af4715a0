"""The graph of llama.cpp's first port of the model: right, with a copy wherever an operation wanted its input tidy.

`copies="everywhere"` runs these forms instead of those in `delta_net` and `attention`; they are equal. The copies
follow the kinds that #19375 lists (views after the convolution, heads repeated before the norm, inputs of the padding,
operands turned over, the state in every chunk, a growing concat, the attention query), not its graph node by node, and
some that llama.cpp still makes (the attention gate, b, a, the repeated heads) are among them. Their number is ours,
not ggml's. What an operation of ggml writes to memory is written here too (`contiguous`).
"""
from tinygrad import Tensor, UOp

from minillama.attention import attend, keys_and_values
from minillama.config import ModelConfig
from minillama.delta_net import causal_conv, chunked, fused, inverse_of_unit_lower, recurrent
from minillama.layers import l2_norm, linear, project, rms_norm
from minillama.state import after
from minillama.weights import AttentionWeights, DeltaNetWeights


def copied(x: Tensor, why: str) -> Tensor:
    """x written to memory, then read and written once more: a copy that no compiler may leave out. `why` names its
    kind; chapter 08 takes them out one kind after the other."""
    return after(x.contiguous())


def repeated(x: Tensor, heads: int) -> Tensor:
    """Shared heads written out: (tokens, k_heads, dim) -> (tokens, heads, dim), a copy per head that shares."""
    tokens, k_heads, dim = x.shape
    return copied(x.unsqueeze(2).expand(tokens, k_heads, heads // k_heads, dim).reshape(tokens, heads, dim), "repeat")


def normed(x: Tensor, heads: int) -> Tensor:
    """Rows scaled to length 1 after they were repeated: with two heads for each, twice the rows."""
    return l2_norm(repeated(x, heads)).contiguous()


def chunked_with_copies(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
                        chunk: int = 64) -> tuple[Tensor, Tensor]:
    """`delta_net.chunked` as the first port had it; heads are repeated already. Arguments and results as there."""
    tokens, heads, dim = v.shape
    if tokens == 1:
        return recurrent_with_copies(q, k, v, g, beta, state)
    chunk = min(chunk, tokens)

    def chunks(x: Tensor) -> Tensor:                # a permuted copy, then another as the input of the padding
        x = x.reshape(tokens // chunk, chunk, *x.shape[1:]).permute(2, 0, 1, *range(3, x.ndim + 1))
        return copied(copied(x, "views"), "padding")

    q, k, v, g, beta = chunks(q * dim ** -0.5), chunks(k), chunks(v), chunks(g), chunks(beta).unsqueeze(-1)
    total = g.cumsum(axis=-1).unsqueeze(-1).contiguous()
    lower = Tensor.ones(chunk, chunk).tril().contiguous()                   # masks were inputs, read from memory
    since = copied(((total - total.transpose(-1, -2)) * lower).exp() * lower, "operands")
    among = copied((((k * beta) @ k.transpose(-1, -2)).contiguous() * since).tril(-1), "operands")
    solve = copied(inverse_of_unit_lower(among).transpose(-1, -2), "operands").transpose(-1, -2)
    sides = (copied(x.transpose(-1, -2), "operands").transpose(-1, -2) for x in (v * beta, k * beta * total.exp()))
    write, erase = (copied((solve @ side).contiguous(), "operands") for side in sides)
    end, out = total[..., -1:, :], None
    for n in range(tokens // chunk):
        turned = copied(state.transpose(-1, -2), "state").transpose(-1, -2)     # turned over in every chunk
        new = (write[:, n] - erase[:, n] @ turned).contiguous()
        inside = (q[:, n] @ k[:, n].transpose(-1, -2) * since[:, n]).contiguous()
        part = (copied(q[:, n] * total[:, n].exp(), "operands") @ turned + inside @ new).contiguous()
        keys = copied((k[:, n] * (end[:, n] - total[:, n]).exp()).transpose(-1, -2), "operands")
        state = (state * end[:, n].exp() + keys @ new).contiguous()
        out = part if out is None else copied(out.cat(part, dim=1), "concat")       # all so far, once more
    return copied(out.transpose(0, 1), "operands"), state


def recurrent_with_copies(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
                          ) -> tuple[Tensor, Tensor]:
    """`delta_net.recurrent` with every token's operands copied out of their batch, and the result turned back."""
    outs = []
    for t in range(v.shape[0]):
        now = [copied(x[t:t + 1], "views") for x in (q, k, v, g, beta)]
        out, state = recurrent(*now, copied(state.transpose(-1, -2), "state").transpose(-1, -2))
        outs.append(copied(out, "operands"))
    return (outs[0] if len(outs) == 1 else copied(outs[0].cat(*outs[1:]), "concat")), state


WITH_COPIES = {recurrent: recurrent_with_copies, chunked: chunked_with_copies, fused: chunked_with_copies}


def delta_net(x: Tensor, w: DeltaNetWeights, config: ModelConfig, delta, window: Tensor, state: Tensor,
              valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`delta_net.delta_net` with the first port's copies. Arguments and results as there."""
    tokens, c = x.shape[0], config
    channels, z, b, a = project(x, w.inputs, (c.conv_channels, c.value_width, c.v_heads, c.v_heads))
    past = copied(window.cat(channels, dim=0), "padding")
    qkv = causal_conv(past, w.conv).contiguous()
    q, k, v = (copied(part.reshape(tokens, -1, c.state_dim), "views")
               for part in qkv.split([c.key_width, c.key_width, c.value_width], dim=-1))
    q, k = (normed(part, v.shape[1]) for part in (q, k))
    g = ((copied(a, "still there") + w.dt_bias).softplus() * w.a).reshape(tokens, -1)
    beta = copied(b, "still there").sigmoid().reshape(tokens, -1)
    if valid is not None:
        g, beta = g * valid.unsqueeze(-1), beta * valid.unsqueeze(-1)
    out, state = WITH_COPIES.get(delta, delta)(q, k, v, g, beta, state)
    gated = rms_norm(out, w.norm, c.norm_eps) * copied(z.reshape(out.shape), "views").silu()
    return linear(gated.reshape(*x.shape[:-1], c.value_width), w.out), past, state


def attention(x: Tensor, w: AttentionWeights, config: ModelConfig, table: Tensor, start: int | UOp = 0,
              cache=None, residual: Tensor | None = None) -> Tensor:
    """`attention.attention` with the first port's copies of query and gate. Arguments and result as there."""
    q, gate, k, v = keys_and_values(x, w, config, table)
    if cache is not None:
        k, v = cache.write(k, v, start)
    out = attend(copied(q, "query"), k, v, start) * copied(gate, "still there").sigmoid()
    return linear(out.reshape(*x.shape[:-1], config.heads * config.head_dim), w.out, residual)
