"""Layers for a batch of sequences: x is (batch, tokens, hidden), float32."""
import numpy as np
import torch
import torch.nn.functional as F

from training.device import DEVICE, HALF
from training.weights import EPS, EXPERTS, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, ROPE_BASE, ROPE_DIM, USED, WIDTH


def embedding(ids, table):
    return F.embedding(ids, table)


def rms(x, weight):
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def linear(x, weight):
    return F.linear(x.to(HALF), weight.to(HALF))


def l2(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def rope_table(tokens: int):
    """Cosines and sines (tokens, 1, ROPE_DIM // 2) each, float32."""
    angles = np.arange(tokens)[:, None] * ROPE_BASE ** (-np.arange(0, ROPE_DIM, 2) / ROPE_DIM)
    return tuple(torch.tensor(f(angles)[:, None], dtype=torch.float32, device=DEVICE) for f in (np.cos, np.sin))


def rope(x, table):
    cos, sin = table
    half = ROPE_DIM // 2
    a, b, rest = x[..., :half], x[..., half:ROPE_DIM], x[..., ROPE_DIM:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def route(x, router):
    """Weights (tokens, experts), zero but for the USED most probable, which sum to 1; and the balancing loss."""
    every = F.linear(x.float(), router).softmax(-1)
    mine, other = every.unsqueeze(-1), every.unsqueeze(-2)
    index = torch.arange(EXPERTS, device=x.device)
    rank = ((other > mine) | ((other == mine) & (index < index[:, None]))).sum(-1)
    chosen = (rank < USED).float()
    share = every * chosen
    balance = EXPERTS / USED * (chosen.detach().mean(0) * every.mean(0)).sum()     # 1 where all are used alike
    return share / share.sum(-1, keepdim=True), balance


def dense_experts(x, w, share):
    """Every expert for every token as two wide products; an expert that was not chosen counts 0."""
    rows = torch.cat([w["ffn_gate_exps"], w["ffn_up_exps"]]).reshape(-1, HIDDEN)
    gate, up = linear(x, rows).chunk(2, dim=-1)                             # (tokens, experts * width) each
    y = (F.silu(gate.float()) * up.float()).reshape(-1, EXPERTS, WIDTH) * share.unsqueeze(-1)
    down = w["ffn_down_exps"].permute(1, 0, 2).reshape(HIDDEN, -1)          # (hidden, experts * width)
    return linear(y.reshape(-1, EXPERTS * WIDTH), down)


def grouped_experts(x, w, share):
    """Only the chosen experts: rows sorted by expert, one grouped product for all. Exact: no token is dropped."""
    probs, ids = share.topk(USED, dim=-1)
    order = ids.reshape(-1).argsort(stable=True)
    ends = (ids.reshape(-1, 1) == torch.arange(EXPERTS, device=x.device)).sum(0).cumsum(0).to(torch.int32)
    row = order // USED
    gate_up = torch.cat([w["ffn_gate_exps"], w["ffn_up_exps"]], dim=1).to(HALF)         # (experts, 2 width, hidden)
    gate, up = torch._grouped_mm(x.to(HALF)[row], gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)
    y = (F.silu(gate.float()) * up.float() * probs.reshape(-1)[order].unsqueeze(-1)).to(HALF)
    out = torch._grouped_mm(y, w["ffn_down_exps"].to(HALF).transpose(1, 2), offs=ends)
    back = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    return out[back].reshape(-1, USED, HIDDEN).sum(1)


def experts_layer(x, w, routed):
    """Routed and shared experts. x (batch, tokens, hidden) float32; returns the same shape and the balancing loss."""
    rows = x.reshape(-1, HIDDEN)
    share, balance = route(rows, w["ffn_gate_inp"])
    inputs = torch.cat([w["ffn_gate_shexp"], w["ffn_up_shexp"]])
    gate, up = linear(rows, inputs).float().chunk(2, dim=-1)
    shared = linear(F.silu(gate) * up, w["ffn_down_shexp"])
    lever = torch.sigmoid((rows * w["ffn_gate_inp_shexp"]).sum(-1, keepdim=True))
    return (routed(rows, w, share) + shared * lever).reshape(x.shape), balance


def projections(x, w, table):
    """q, k, v (batch, heads, tokens, dim), all with HEADS heads, and the gate (batch, tokens, heads * dim)."""
    batch, tokens, _ = x.shape
    q, k, v = linear(x, torch.cat([w["attn_q"], w["attn_k"], w["attn_v"]])).split(
        [2 * HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], dim=-1)
    q, gate = q.reshape(batch, tokens, HEADS, 2 * HEAD_DIM).chunk(2, dim=-1)            # per head: [query | gate]
    q = rope(rms(q, w["attn_q_norm"]), table)
    k = rope(rms(k.reshape(batch, tokens, KV_HEADS, HEAD_DIM), w["attn_k_norm"]), table)
    v = v.reshape(batch, tokens, KV_HEADS, HEAD_DIM)
    k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=2) for t in (k, v))
    q, k, v = (t.to(HALF).transpose(1, 2).contiguous() for t in (q, k, v))
    return q, k, v, gate.reshape(batch, tokens, -1)


def gated_output(out, gate, w):
    out = out.transpose(1, 2).reshape(gate.shape).float() * torch.sigmoid(gate.float())
    return linear(out, w["attn_output"])


def attention_layer(x, w, table, mask, routed):
    """x (batch, tokens, hidden) float32; mask (2, batch, tokens, hidden): dropout. Also returns the balancing loss."""
    q, k, v, gate = projections(rms(x, w["attn_norm"]), w, table)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + gated_output(out, gate, w) * mask[0]
    y, balance = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return x + y * mask[1], balance
