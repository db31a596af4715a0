"""The Gated DeltaNet layer in chunks: chunks lead, (chunks, batch, heads, chunk, dim)."""
import torch
import torch.nn.functional as F

from training.kernels import inverse_of_unit_lower, states
from training.layers import experts_layer, l2, linear, rms
from training.weights import CONV, K_HEADS, KEY, STATE_DIM, V_HEADS, VALUE

CHUNK = 64


def chunks(x):
    """(batch, tokens, heads, ...) -> (chunks, batch, heads, CHUNK, ...)."""
    x = x.reshape(x.shape[0], -1, CHUNK, *x.shape[2:])
    return x.permute(1, 0, 3, 2, *range(4, x.ndim))


def delta_layer(x, w, mask, routed):
    """As attention_layer, with a Gated DeltaNet mixer."""
    batch, tokens, _ = x.shape
    normed = rms(x, w["attn_norm"])
    channels, z = linear(normed, torch.cat([w["attn_qkv"], w["attn_gate"]])).float().split(
        [2 * KEY + VALUE, VALUE], dim=-1)
    ba = F.linear(normed, w["ssm_ba"]).reshape(batch, tokens, K_HEADS, 2, V_HEADS // K_HEADS)    # k-head [b b | a a]
    b, a = ba[:, :, :, 0].reshape(batch, tokens, V_HEADS), ba[:, :, :, 1].reshape(batch, tokens, V_HEADS)
    past = F.pad(channels, (0, 0, CONV - 1, 0))
    qkv = F.silu(sum(past[:, i:i + tokens] * w["ssm_conv1d"][:, i] for i in range(CONV)))
    q, k, v = (t.reshape(batch, tokens, -1, STATE_DIM) for t in qkv.split([KEY, KEY, VALUE], dim=-1))
    g = -F.softplus(a + w["ssm_dt.bias"]) * torch.exp(w["ssm_a"])
    out = gated_delta_rule(l2(q), l2(k), v, g, torch.sigmoid(b))
    out = rms(out, w["ssm_norm"]) * F.silu(z.reshape(out.shape))
    x = x + linear(out.reshape(batch, tokens, VALUE), w["ssm_out"]) * mask[0]
    y, balance = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return x + y * mask[1], balance


def gated_delta_rule(q, k, v, g, beta):
    """The chunked form, float32; q, k (batch, tokens, k_heads, dim), v with v_heads; g, beta (batch, tokens, v_heads).

    The state is linear from chunk to chunk: S' = M S + U. M and U of all chunks are made at once, and `states` alone
    walks from chunk to chunk.
    """
    shared = V_HEADS // K_HEADS
    q, k = (chunks(t.repeat_interleave(shared, dim=2)) for t in (q * STATE_DIM ** -0.5, k))
    v, beta = chunks(v), chunks(beta).unsqueeze(-1)
    total = chunks(g).cumsum(-1).unsqueeze(-1)
    since = (total - total.transpose(-1, -2)).tril().exp().tril()
    solve = inverse_of_unit_lower(((k * beta) @ k.transpose(-1, -2) * since).tril(-1).contiguous())
    write, erase = solve @ (v * beta), solve @ (k * beta * total.exp())
    inside = q @ k.transpose(-1, -2) * since
    end = total[..., -1:, :]
    keys = (k * (end - total).exp()).transpose(-1, -2)
    eye = torch.eye(STATE_DIM, device=q.device)
    state = states((eye * end.exp() - keys @ erase).contiguous(), (keys @ write).contiguous())
    out = (q * total.exp()) @ state + inside @ (write - erase @ state)
    return out.permute(1, 0, 3, 2, 4).reshape(out.shape[1], -1, V_HEADS, STATE_DIM)
