"""Gated DeltaNet: a causal convolution, then a memory matrix that decays, reads and overwrites.

Two forms of the gated delta rule stand here, `recurrent` (a loop over tokens) and `chunked` (a loop over chunks of
64); they take the same arguments and are equal. Axis 0 is the tokens; a batch of sequences folds into the heads.
Source: Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks"; llama.cpp #16095, #19375.
"""
from tinygrad import Tensor

from minillama.config import ModelConfig
from minillama.kernels import chunks as chunk_kernels
from minillama.kernels import conv, norm, recurrence
from minillama.kernels import delta as kernels
from minillama.kernels.cores import on_cpu
from minillama.kernels.packed import Packed
from minillama.kernels.product import Normed
from minillama.layers import columns, l2_norm, linear, project, rms_norm
from minillama.weights import DeltaNetWeights

CHUNK = 64


def share_heads(x: Tensor, heads: int) -> Tensor:
    """Neighbouring heads share one: (tokens, k_heads, dim) -> (tokens, heads, dim); j reads j // (heads / k_heads)."""
    tokens, k_heads, dim = x.shape
    return x.unsqueeze(2).expand(tokens, k_heads, heads // k_heads, dim).reshape(tokens, heads, dim)


def recurrent(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The gated delta rule, one token after another.

    q, k (tokens, k_heads, dim), rows of length 1; v (tokens, v_heads, dim); g, beta (tokens, v_heads): the logarithm
    of the decay (<= 0) and the strength of the write (0..1); state (v_heads, dim, dim): rows are key dimensions.
    Returns out (tokens, v_heads, dim) and the state after the last token. Source: eq. 10 of the paper.
    """
    heads, dim = v.shape[1:]
    q, k = share_heads(q, heads) * dim ** -0.5, share_heads(k, heads)
    outs = []
    for t in range(v.shape[0]):
        key = k[t].unsqueeze(-1)                                            # (heads, dim, 1)
        state = state * g[t].exp().reshape(heads, 1, 1)                     # forget
        old = (state * key).sum(axis=1)                                     # (heads, dim): what this key holds now
        delta = (v[t] - old) * beta[t].unsqueeze(-1)                        # (heads, dim): what is missing
        state = (state + key * delta.unsqueeze(1)).contiguous()             # write the difference
        outs.append((state * q[t].unsqueeze(-1)).sum(axis=1))               # (heads, dim)
    return Tensor.stack(*outs), state


def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor,
            chunk: int = CHUNK) -> tuple[Tensor, Tensor]:
    """The same rule with one step per chunk of tokens: products of matrices in place of a loop over tokens.

    Arguments and results as `recurrent`; the token count must be a multiple of min(chunk, tokens). Within a chunk
    all writes are solved for at once (`inverse_of_unit_lower`); only the state passes from chunk to chunk.
    One token is a step of the recurrence. Source: section 3.3 of the paper; llama.cpp #19375 keeps the state
    transposed through this loop.
    """
    tokens, heads, dim = v.shape
    if tokens == 1:
        return recurrent(q, k, v, g, beta, state)
    chunk = min(chunk, tokens)
    q, k = q.contiguous(), k.contiguous()           # several products read them: what makes them must not run in each

    def chunks(x: Tensor) -> Tensor:                                        # -> (heads, chunks, chunk, ...)
        return x.reshape(tokens // chunk, chunk, *x.shape[1:]).permute(2, 0, 1, *range(3, x.ndim + 1))

    q, k, v = chunks(share_heads(q, heads) * dim ** -0.5), chunks(share_heads(k, heads)), chunks(v)
    beta = chunks(beta).unsqueeze(-1)                                       # (heads, chunks, chunk, 1)
    # what several products read, or a product in all of its rows, is computed once: hence every `contiguous`
    total = chunks(g).cumsum(axis=-1).contiguous().unsqueeze(-1)            # log decay since the chunk began
    since = (total - total.transpose(-1, -2)).tril().exp().tril().contiguous()      # (.., i, j): decay from j to i
    told = (k * beta).contiguous()
    among = told @ k.transpose(-1, -2) * since                              # what write j leaves at key i
    solve = inverse_of_unit_lower(among.tril(-1).contiguous())
    write = (solve @ (v * beta).contiguous()).contiguous()                  # (heads, chunks, chunk, dim)
    erase = (solve @ (told * total.exp()).contiguous()).contiguous()        # what the incoming state adds to it
    inside = (q @ k.transpose(-1, -2) * since).contiguous()                 # (heads, chunks, chunk, chunk)
    reads = (q * total.exp()).contiguous()
    end = total[..., -1:, :]                                                # (heads, chunks, 1, 1)
    keys = (k * (end - total).exp()).contiguous().transpose(-1, -2)         # (heads, chunks, dim, chunk)
    states, news = [], []
    for n in range(tokens // chunk):
        states.append(state)
        news.append((write[:, n] - erase[:, n] @ state).contiguous())       # (heads, chunk, dim)
        state = (state * end[:, n].exp() + keys[:, n] @ news[-1]).contiguous()
    # the outputs of all chunks at once: stacked one by one, each would be computed in the place of every other
    before, new = (Tensor.stack(*parts, dim=1).contiguous() if len(parts) > 1 else parts[0].unsqueeze(1)
                   for parts in (states, news))
    out = (reads @ before).contiguous() + inside @ new                      # (heads, chunks, chunk, dim)
    return out.reshape(heads, tokens, dim).transpose(0, 1), state


def fused(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """The rule by hand: `chunked`, where threads can share memory with two kernels in place of its solving and its
    loop; elsewhere `recurrent` in one. Arguments and results as these; no gradients pass through the kernels."""
    if chunk_kernels.fits(q.device, *v.shape[::2]):
        return chunk_kernels.chunked(q, k, v, g, beta, state)
    return (recurrence.recurrent if recurrence.fits(q.device, v.shape[0]) else chunked)(q, k, v, g, beta, state)


def inverse_of_unit_lower(lower: Tensor) -> Tensor:
    """(I + lower)^-1 for a strictly lower triangular matrix (..., n, n), n a power of two, in log2(n) steps.

    Blocks on the diagonal double in each step: [[A, 0], [C, B]]^-1 = [[A^-1, 0], [-B^-1 C A^-1, B^-1]], for all pairs
    of blocks at once. The shorter product (I - L)(I + L^2)(I + L^4)... is exact on paper, but its powers reach 1e17
    when a text repeats one key 64 times, and then float32 keeps no digit of the result.
    """
    size = lower.shape[-1]
    index = Tensor.arange(size)
    row, column = index.reshape(size, 1), index.reshape(1, size)
    inverse = (row == column).cast(lower.dtype).expand(lower.shape)
    width = 1
    while width < size:
        pairs = (row // (2 * width) == column // (2 * width)) & (row // width != column // width)
        corner = pairs.where(lower, 0)                                      # C of every pair
        inverse = inverse - (corner if width == 1 else (inverse @ corner).contiguous() @ inverse)
        inverse = inverse.contiguous()
        width *= 2
    return inverse


def causal_conv(past: Tensor, weight: Tensor) -> Tensor:
    """Depthwise causal convolution, then SiLU: each output sees its own token and the width - 1 before it.

    past (width - 1 + tokens, ..., channels), weight (channels, width); returns (tokens, ..., channels).
    """
    width = weight.shape[1]
    tokens = past.shape[0] - width + 1
    return sum(past[i:i + tokens] * weight[:, i] for i in range(width)).silu()


def delta_net(x: Tensor, w: DeltaNetWeights, config: ModelConfig, delta, window: Tensor, state: Tensor,
              valid: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One Gated DeltaNet mixer. x (tokens, ..., hidden); `delta` is one form of the rule.

    window (width - 1, ..., channels) and state (v_heads, dim, dim) are from before x; `valid` (tokens,) is 0 for
    padding, which must not write. Returns out (tokens, ..., hidden); past (width - 1 + tokens, ..., channels), all
    inputs of the convolution, of which the caller keeps the last; and the new state.
    """
    tokens, c = x.shape[0], config
    widths = (c.conv_channels, c.value_width, c.v_heads, c.v_heads)
    by_hand = isinstance(w.inputs[0], Packed) and x.ndim == 2 and conv.fits(tokens)
    if by_hand:
        runs, window = columns(x, w.inputs, widths), window.contiguous()
        source, first = runs[0]
        qkv, buffer = conv.conv((source.contiguous(), first), window, w.conv)
        runs = [(buffer if y is source else y, at) for y, at in runs]
        channels, z, b, a = (y[:, at:at + width] for (y, at), width in zip(runs, widths, strict=True))
        past = window.cat(channels, dim=0)
    else:
        channels, z, b, a = project(x, w.inputs, widths)
        past = window.cat(channels, dim=0).contiguous()                     # the window is read before its update
        qkv = causal_conv(past, w.conv)
    q, k, v = (part.reshape(tokens, -1, c.state_dim)
               for part in qkv.split([c.key_width, c.key_width, c.value_width], dim=-1))
    g = ((a + w.dt_bias).softplus() * w.a).reshape(tokens, -1)              # (tokens, v_heads)
    beta = b.sigmoid().reshape(tokens, -1)
    if valid is not None:
        g, beta = g * valid.unsqueeze(-1), beta * valid.unsqueeze(-1)
    out, state = delta(l2_norm(q), l2_norm(k), v, g, beta, state)           # (tokens, v_heads, dim)
    if by_hand and on_cpu(x.device):
        gated = norm.gated(out, w.norm, c.norm_eps, runs[1])
    else:
        gated = rms_norm(out, w.norm, c.norm_eps) * z.reshape(out.shape).silu()
    return linear(gated.reshape(*x.shape[:-1], c.value_width), w.out), past, state


def delta_net_step(x: Tensor | Normed, w: DeltaNetWeights, config: ModelConfig, history: Tensor, memories: Tensor,
                   position: Tensor, residual: Tensor | None = None) -> Tensor:
    """One Gated DeltaNet mixer for a few tokens, in three or four kernels, plus `residual`.

    x and result (tokens, hidden); history (kernels.HISTORY, channels) and memories (slots, v_heads, dim, dim) are
    rings over positions, read and written in place; position (1,) int32 is that of the first token. Source: llama.cpp
    #19504.
    """
    c = config
    qkv, z, b, a = columns(x, w.inputs, (c.conv_channels, c.value_width, c.v_heads, c.v_heads))
    y = kernels.conv_and_step(qkv, history, w.conv, z, b, a, memories, w.dt_bias, w.a, w.norm, c.norm_eps, position)
    return linear(y, w.out, residual)
