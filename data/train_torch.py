"""Trains the shipped model with PyTorch on one GPU: the recipe behind `data/*.gguf`.

    python data/train_torch.py --corpus build/corpus --out /tmp/run --minutes 24     # train; parts and log in --out
    python data/train_torch.py --corpus build/corpus --trial                      # tokens a second of variants
    python data/train_torch.py --import-parts DIR --gguf OUT.gguf                     # parts -> GGUF; needs no torch

The maths is the engine's (`minillama/model.py`), for a batch of sequences, with the weights under their names in the
GGUF file; only ssm_a = -exp(A_log) is trained as A_log. Mixed precision: matrix products in bfloat16; the residual
stream, norms, router, softmax, decays and the delta rule's algebra in float32 (products in TF32, the triangular
inverse in float32 proper).

Loss: next token + MTP (the token after; then one further, the block fed with its own output and attending to the
keys of its first pass, as in drafting) + load balancing. The MTP targets are half the text's, half the trunk's own
distribution, since a draft is accepted where it agrees with the trunk. Optimizer: Muon for matrices, Adam for the
rest. The learning rate follows the wall clock, so that training ends annealed whatever the speed.
"""
import argparse
import json
import lzma
import math
import os
import sys
import time
from pathlib import Path

import numpy as np

try:
    import torch
    import torch.nn.functional as F
except ImportError:     # `--import-parts` works without
    torch = None
try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None
if torch:
    CUDA = torch.cuda.is_available()
    DEVICE = "cuda" if CUDA else "cpu"
    HALF = torch.bfloat16 if CUDA else torch.float32    # of the large matrix products
    torch.set_float32_matmul_precision("high")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

VOCAB, HIDDEN, LAYERS, EPS = 4096, 256, 8, 1e-6
HEADS, KV_HEADS, HEAD_DIM, ROPE_DIM, ROPE_BASE = 4, 2, 64, 16, 1e4
K_HEADS, V_HEADS, STATE_DIM, CONV = 2, 4, 64, 4
EXPERTS, USED, WIDTH, SHARED = 16, 4, 128, 256
KEY, VALUE = K_HEADS * STATE_DIM, V_HEADS * STATE_DIM
CHUNK = 64
END = "<|endoftext|>"
PART_BYTES = 14_500_000
NAME = "Minicoder 20M"


# ---- parts: 16-bit weights in files small enough to travel -------------------------------------------------------

def save_parts(folder: Path, tensors: dict[str, np.ndarray], about: dict) -> None:
    """Float16 matrices and float32 vectors, in files of at most PART_BYTES; `about` goes into about.json, last."""
    folder.mkdir(parents=True, exist_ok=True)
    parts, size = [{}], 0
    for name, values in tensors.items():
        kept = values.astype(np.float16 if values.ndim > 1 else np.float32)
        if size + kept.nbytes > PART_BYTES:
            parts, size = [*parts, {}], 0
        parts[-1][name] = kept
        size += kept.nbytes
    for i, part in enumerate(parts):
        np.savez(folder / f".weights-{i}.npz", **part)
        os.replace(folder / f".weights-{i}.npz", folder / f"weights-{i}.npz")
    (folder / "about.json").write_text(json.dumps(about | {"parts": len(parts)}, indent=1))


def import_parts(folder: Path, path: Path, tokenizer_json: Path, format: str) -> None:
    """Write the parts of `folder` as one GGUF file."""
    from minillama.export import model_config, write_model
    tensors = {}
    for part in sorted(folder.glob("weights-*.npz")):
        with np.load(part) as file:
            tensors |= {name: file[name].astype(np.float32) for name in file.files}
    write_model(path, model_config(NAME), tensors, tokenizer_json, name=NAME, format=format)
    print(f"{path}: {len(tensors)} tensors, {sum(v.size for v in tensors.values()):,} parameters")


# ---- text ----------------------------------------------------------------------------------------------------------

def load_tokens(corpus: Path, name: str, cache: Path) -> tuple[np.ndarray, int]:
    """Tokens of all documents, each followed by <|endoftext|>, as int16; and the number of bytes of their text."""
    from tokenizers import Tokenizer
    path = cache / f"{name}.npz"
    if not path.exists():
        documents = lzma.decompress((corpus / f"{name}.txt.xz").read_bytes()).decode().split("\x00")
        tokenizer = Tokenizer.from_file(str(corpus / "tokenizer.json"))
        end, pieces = tokenizer.token_to_id(END), []
        for i in range(0, len(documents), 512):
            for encoding in tokenizer.encode_batch(documents[i:i + 512], add_special_tokens=False):
                pieces.append(np.array([*encoding.ids, end], dtype=np.int16))
        cache.mkdir(parents=True, exist_ok=True)
        np.savez(path, tokens=np.concatenate(pieces), bytes=sum(len(d.encode()) for d in documents))
    file = np.load(path)
    return file["tokens"], int(file["bytes"])


# ---- weights -------------------------------------------------------------------------------------------------------

def initial_weights(seed: int) -> dict:
    """Float32 leaves on the device under the GGUF's names. Matrices that write to the residual stream start small."""
    random = torch.Generator().manual_seed(seed)
    weights = {}

    def normal(name: str, shape: tuple, std: float) -> None:
        weights[name] = torch.randn(shape, generator=random) * std

    def matrix(name: str, *shape: int, gain: float = 0.5) -> None:
        normal(name, shape, gain * shape[-1] ** -0.5)

    def ones(name: str, size: int) -> None:
        weights[name] = torch.ones(size)

    small = 0.5 * (2 * LAYERS) ** -0.5
    normal("token_embd.weight", (VOCAB, HIDDEN), 0.25)
    normal("output.weight", (VOCAB, HIDDEN), 0.005)
    ones("output_norm.weight", HIDDEN)
    for i in range(LAYERS + 1):
        at = f"blk.{i}."
        ones(at + "attn_norm.weight", HIDDEN)
        ones(at + "post_attention_norm.weight", HIDDEN)
        if is_recurrent(i):
            matrix(at + "attn_qkv.weight", 2 * KEY + VALUE, HIDDEN)
            matrix(at + "attn_gate.weight", VALUE, HIDDEN)
            matrix(at + "ssm_ba.weight", 2 * V_HEADS, HIDDEN)
            weights[at + "ssm_conv1d.weight"] = torch.rand(2 * KEY + VALUE, CONV, generator=random) - 0.5
            step = torch.exp(torch.rand(V_HEADS, generator=random) * math.log(100) + math.log(1e-3))     # 0.001 .. 0.1
            weights[at + "ssm_dt.bias"] = step + torch.log(-torch.expm1(-step))                      # softplus^-1
            weights[at + "ssm_a"] = torch.log(torch.rand(V_HEADS, generator=random) * 15 + 1)        # A_log
            ones(at + "ssm_norm.weight", STATE_DIM)
            matrix(at + "ssm_out.weight", HIDDEN, VALUE, gain=small)
        else:
            matrix(at + "attn_q.weight", 2 * HEADS * HEAD_DIM, HIDDEN)
            matrix(at + "attn_k.weight", KV_HEADS * HEAD_DIM, HIDDEN)
            matrix(at + "attn_v.weight", KV_HEADS * HEAD_DIM, HIDDEN)
            matrix(at + "attn_output.weight", HIDDEN, HEADS * HEAD_DIM, gain=small)
            ones(at + "attn_q_norm.weight", HEAD_DIM)
            ones(at + "attn_k_norm.weight", HEAD_DIM)
        matrix(at + "ffn_gate_inp.weight", EXPERTS, HIDDEN)
        matrix(at + "ffn_gate_exps.weight", EXPERTS, WIDTH, HIDDEN)
        matrix(at + "ffn_up_exps.weight", EXPERTS, WIDTH, HIDDEN)
        matrix(at + "ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH, gain=small)
        normal(at + "ffn_gate_inp_shexp.weight", (HIDDEN,), 0.02)
        matrix(at + "ffn_gate_shexp.weight", SHARED, HIDDEN)
        matrix(at + "ffn_up_shexp.weight", SHARED, HIDDEN)
        matrix(at + "ffn_down_shexp.weight", HIDDEN, SHARED, gain=small)
        if i == LAYERS:
            matrix(at + "nextn.eh_proj.weight", HIDDEN, 2 * HIDDEN)
            for part in ("enorm", "hnorm", "shared_head_norm"):
                ones(f"{at}nextn.{part}.weight", HIDDEN)
    return {name: value.to(DEVICE).requires_grad_() for name, value in weights.items()}


def is_recurrent(i: int) -> bool:
    return i < LAYERS and (i + 1) % 4 != 0


def of_block(weights: dict, i: int) -> dict:
    """The weights of one block, names without "blk.i." and ".weight"."""
    at = f"blk.{i}."
    return {name[len(at):].removesuffix(".weight"): value for name, value in weights.items() if name.startswith(at)}


def in_file_form(weights: dict) -> dict[str, np.ndarray]:
    """As the GGUF file wants them: numpy, float32, ssm_a = -exp(A_log)."""
    values = {name: value.detach().float().cpu().numpy() for name, value in weights.items()}
    return {name: -np.exp(value) if name.endswith("ssm_a") else value for name, value in values.items()}


# ---- layers: x is (batch, tokens, hidden) -------------------------------------------------------------------------

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


# ---- Gated DeltaNet: chunks lead, (chunks, batch, heads, chunk, dim) ----------------------------------------------

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


if torch:
    if triton:
        @triton.jit
        def invert_kernel(source, target, SIZE: tl.constexpr, STEPS: tl.constexpr):
            at = tl.program_id(0).to(tl.int64) * SIZE * SIZE
            row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
            lower = tl.load(source + at + row * SIZE + column)
            lower = tl.where(row > column, lower, 0.0)
            inverse = tl.where(row == column, 1.0, 0.0)
            for step in tl.static_range(STEPS):
                pairs = ((row >> (step + 1)) == (column >> (step + 1))) & ((row >> step) != (column >> step))
                corner = tl.where(pairs, lower, 0.0)
                if step == 0:
                    inverse -= corner
                else:
                    product = tl.dot(inverse, corner, input_precision="tf32x3")
                    inverse -= tl.dot(product, inverse, input_precision="tf32x3")
            tl.store(target + at + row * SIZE + column, inverse)

    @torch.library.custom_op("minillama::inverse_of_unit_lower", mutates_args=())
    def inverse_of_unit_lower(lower: torch.Tensor) -> torch.Tensor:
        """(I + lower)^-1, blocks on the diagonal doubling in each step (see minillama/delta_net.py)."""
        size = lower.shape[-1]
        if lower.is_cuda and triton:
            inverse = torch.empty_like(lower)
            invert_kernel[(lower.numel() // size ** 2,)](lower, inverse, size, size.bit_length() - 1)
            return inverse
        index = torch.arange(size, device=lower.device)
        row, column = index[:, None], index
        inverse, width = torch.eye(size, device=lower.device).expand(lower.shape), 1
        while width < size:
            pairs = (row // (2 * width) == column // (2 * width)) & (row // width != column // width)
            corner = torch.where(pairs, lower, 0.0)
            inverse = inverse - (corner if width == 1 else inverse @ corner @ inverse)
            width *= 2
        return inverse.contiguous()

    @inverse_of_unit_lower.register_fake
    def _(lower):
        return torch.empty_like(lower)

    def _inverse_backward(ctx, grad):
        (inverse,) = ctx.saved_tensors
        turned = inverse.transpose(-1, -2)
        return -(turned @ grad @ turned).tril(-1)

    def _keep_inverse(ctx, inputs, output):
        ctx.save_for_backward(output)

    inverse_of_unit_lower.register_autograd(_inverse_backward, setup_context=_keep_inverse)

    @torch.library.custom_op("minillama::states", mutates_args=())
    def states(step: torch.Tensor, more: torch.Tensor) -> torch.Tensor:
        """S[0] = 0, S[n + 1] = step[n] S[n] + more[n]; all (chunks, batch, heads, dim, dim)."""
        flat_step, flat_more = step.flatten(1, 2), more.flatten(1, 2)
        out = torch.zeros_like(flat_more)
        for n in range(out.shape[0] - 1):
            torch.baddbmm(flat_more[n], flat_step[n], out[n], out=out[n + 1])
        return out.reshape(more.shape)

    @states.register_fake
    def _(step, more):
        return torch.empty_like(more)

    @torch.library.custom_op("minillama::states_backward", mutates_args=())
    def states_backward(grad: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
        """The gradient of `more`: what S[n + 1] is worth, gathered from the last chunk to the first."""
        flat_grad, turned = grad.flatten(1, 2).contiguous(), step.flatten(1, 2).transpose(-1, -2)
        out = torch.zeros_like(flat_grad)
        count = out.shape[0]
        if count > 1:
            out[count - 2].copy_(flat_grad[count - 1])
        for n in range(count - 3, -1, -1):
            torch.baddbmm(flat_grad[n + 1], turned[n + 1], out[n + 1], out=out[n])
        return out.reshape(step.shape)

    @states_backward.register_fake
    def _(grad, step):
        return torch.empty_like(step)

    def _keep(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output)

    def _states_grad(ctx, grad):
        step, state = ctx.saved_tensors
        of_more = states_backward(grad, step)
        return of_more @ state.transpose(-1, -2), of_more

    states.register_autograd(_states_grad, setup_context=_keep)


# ---- heads and losses ----------------------------------------------------------------------------------------------

def trunk_loss(x, norm, head, targets):
    """Mean cross-entropy, the normed hidden states, and the logits without gradient."""
    hidden = rms(x, norm)
    logits = linear(hidden, head)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), hidden, logits.detach()


def draft_loss(hidden, head, targets, trunk, soft: float):
    """Cross-entropy of the block's guesses, `soft` of it against the trunk's distribution, which is one token ahead.

    hidden (batch, tokens, hidden); targets (batch, tokens), -1 where none; trunk logits (batch, tokens, vocab).
    """
    logits = linear(hidden, head).float()
    log_norm = logits.logsumexp(-1)
    text = log_norm - logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ahead = torch.cat([trunk[:, 1:], trunk[:, -1:]], dim=1).float().softmax(-1)
    agree = log_norm - (ahead * logits).sum(-1)
    known = (targets >= 0).float()
    paired = torch.cat([known[:, :-1], torch.zeros_like(known[:, :1])], dim=1)
    return (1 - soft) * (text * known).sum() / known.sum() + soft * (agree * paired).sum() / paired.sum()


def draft_input(embedded, hidden, w):
    both = torch.cat([rms(embedded, w["nextn.enorm"]), rms(hidden, w["nextn.hnorm"])], dim=-1)
    return linear(both, w["nextn.eh_proj"]).float()


def first_draft(embedded, hidden, w, table, mask, routed):
    """The block on true hidden states: its normed output, its keys and values, the balancing loss."""
    x = draft_input(embedded, hidden, w)
    q, k, v, gate = projections(rms(x, w["attn_norm"]), w, table)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + gated_output(out, gate, w) * mask[0]
    y, balance = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return rms(x + y * mask[1], w["nextn.shared_head_norm"]), k, v, balance


def second_draft(embedded, output, keys, values, w, table, seen, mask, routed):
    """The block on its own output, one position on. It sees the first pass's keys before its position, and its own
    there: `seen` (tokens, 2 * tokens) says so."""
    recycled = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
    x = draft_input(embedded, recycled, w)
    q, k, v, gate = projections(rms(x, w["attn_norm"]), w, table)
    out = F.scaled_dot_product_attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), attn_mask=seen)
    x = x + gated_output(out, gate, w) * mask[0]
    y, _ = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return rms(x + y * mask[1], w["nextn.shared_head_norm"])


class Model:
    """The pieces above, compiled, for one batch shape; `weights` are float32 leaves."""

    def __init__(self, weights: dict, batch: int, tokens: int, experts: str = "dense", compile: bool = True,
                 soft: float = 0.5):
        self.weights, self.batch, self.tokens, self.soft = weights, batch, tokens, soft
        self.routed = {"dense": dense_experts, "grouped": grouped_experts}[experts]
        self.blocks = [of_block(weights, i) for i in range(LAYERS + 1)]
        self.table = rope_table(tokens)
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE)
        self.seen = torch.cat([ones.tril(-1), torch.eye(tokens, dtype=torch.bool, device=DEVICE)], dim=1)
        self.masks = torch.ones(LAYERS + 2, 2, batch, tokens, HIDDEN, dtype=HALF, device=DEVICE)
        make = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
        self.delta, self.attention, self.first, self.second = map(
            make, (delta_layer, attention_layer, first_draft, second_draft))
        self.embed, self.trunk_loss, self.draft_loss = make(embedding), make(trunk_loss), make(draft_loss)

    def set_dropout(self, rate: float) -> None:
        if rate:
            self.masks.bernoulli_(1 - rate).mul_(1 / (1 - rate))
        else:
            self.masks.fill_(1.0)

    def trunk(self, ids):
        """ids (batch, tokens) -> the residual stream after the last layer, float32, and the balancing losses' sum."""
        x, balance = self.embed(ids, self.weights["token_embd.weight"]), 0.0
        for i in range(LAYERS):
            more = () if is_recurrent(i) else (self.table,)
            x, cost = (self.delta if is_recurrent(i) else self.attention)(
                x, self.blocks[i], *more, self.masks[i], self.routed)
            balance = balance + cost
        return x, balance

    def losses(self, ids):
        """ids (batch, tokens + 2) -> next-token, first-draft, second-draft and balancing loss, and for evaluation the
        trunk's hidden states and both drafts'."""
        ids, w, block = ids.long(), self.weights, self.blocks[LAYERS]
        embed, head, tokens = w["token_embd.weight"], w["output.weight"], self.tokens
        x, balance = self.trunk(ids[:, :tokens].contiguous())
        loss, hidden, logits = self.trunk_loss(x, w["output_norm.weight"], head, ids[:, 1:tokens + 1])
        ahead, after = self.embed(ids[:, 1:tokens + 1].contiguous(), embed), ids[:, 2:].contiguous()
        first, keys, values, cost = self.first(ahead, hidden, block, self.table, self.masks[LAYERS], self.routed)
        second = self.second(ahead, first, keys, values, block, self.table, self.seen, self.masks[LAYERS + 1],
                             self.routed)
        late = torch.cat([torch.full_like(after[:, :1], -1), after[:, 1:]], dim=1)
        return (loss, self.draft_loss(first, head, after, logits, self.soft),
                self.draft_loss(second, head, late, logits, self.soft), (balance + cost) / (LAYERS + 1),
                hidden, first, second)


# ---- optimizer -----------------------------------------------------------------------------------------------------

def orthogonalize(g):
    """Matrices of the same directions with singular values near 1, by five Newton-Schulz steps; g (n, rows <=
    columns). Source: Jordan 2024, "Muon"."""
    x = g.to(HALF)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(HALF)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


class Optimizer:
    """Muon for the matrices of the blocks (an expert is one matrix), Adam for embedding, head, router, vectors.

    Everything happens on the device; `settings` holds what changes from step to step, so that a captured graph can be
    replayed: [learning rate relative to the peak, Adam's bias corrections 1 - b1^t and 1 - b2^t].
    """

    def __init__(self, weights: dict, muon_lr: float, adam_lr: float, embed_lr: float, decay: float):
        self.weights, self.muon_lr, self.decay = weights, muon_lr, decay
        self.settings = torch.ones(3, device=DEVICE)
        self.groups, self.adam = {}, {}
        small = ("ffn_gate_inp.weight", "ssm_ba.weight", "ssm_conv1d.weight", "output.weight", "token_embd.weight")
        for name, p in weights.items():
            if p.ndim == 1 or name.endswith(small):
                rate = embed_lr if name == "token_embd.weight" else adam_lr
                self.adam.setdefault(rate, []).append(name)
            else:
                self.groups.setdefault(tuple(sorted(p.shape[-2:])), []).append(name)
        self.momentum = {shape: torch.zeros_like(self.stacked(weights, names)) for shape, names in self.groups.items()}
        self.first = {name: torch.zeros_like(weights[name]) for names in self.adam.values() for name in names}
        self.second = {name: torch.zeros_like(value) for name, value in self.first.items()}

    @staticmethod
    def upright(t):
        t = t if t.ndim == 3 else t.unsqueeze(0)
        return t if t.shape[1] <= t.shape[2] else t.transpose(1, 2)

    def stacked(self, tensors: dict, names: list):
        """(n, rows <= columns): all matrices of one shape."""
        return torch.cat([self.upright(tensors[name].detach()) for name in names])

    def step(self, grads: dict) -> None:
        for shape, names in self.groups.items():
            g, momentum = self.stacked(grads, names), self.momentum[shape]
            momentum.lerp_(g, 0.05)
            rate = 0.2 * math.sqrt(shape[1]) * self.muon_lr * self.settings[0]     # rms as Adam's steps have it
            update = orthogonalize(g.lerp(momentum, 0.95)) * rate
            views = [self.upright(self.weights[name]) for name in names]
            torch._foreach_mul_(views, 1 - self.decay * self.muon_lr * self.settings[0])
            torch._foreach_sub_(views, list(update.split([view.shape[0] for view in views])))
        for rate, names in self.adam.items():
            g, p, m, v = ([t[name] for name in names] for t in (grads, self.weights, self.first, self.second))
            torch._foreach_lerp_(m, g, 0.1)
            torch._foreach_mul_(v, 0.95)
            torch._foreach_addcmul_(v, g, g, 0.05)
            size = torch._foreach_div(v, self.settings[2])
            torch._foreach_sqrt_(size)
            torch._foreach_add_(size, 1e-8)
            update = torch._foreach_div(m, size)
            torch._foreach_mul_(update, rate * self.settings[0] / self.settings[1])
            torch._foreach_sub_(p, update)

    def set(self, scale: float, step: int) -> None:
        values = torch.tensor([scale, 1 - 0.9 ** step, 1 - 0.95 ** step])
        self.settings.copy_(values, non_blocking=True)

    def state(self) -> list:
        return [*self.weights.values(), *self.momentum.values(), *self.first.values(), *self.second.values()]


class Trainer:
    """One training step, captured as a CUDA graph where possible."""

    def __init__(self, model: Model, optimizer: Optimizer, tokens, options):
        self.model, self.optimizer, self.text, self.options = model, optimizer, tokens, options
        self.starts = torch.zeros(model.batch, dtype=torch.int64, device=DEVICE)
        self.reach = torch.arange(model.tokens + 2, device=DEVICE)
        self.weigh = torch.ones(2, device=DEVICE)                           # of the two draft losses
        self.report = torch.zeros(6, device=DEVICE)                         # sums: losses, gradient norm, bad steps
        self.graph, self.running = None, []

    def compute(self) -> None:
        o, w = self.options, self.model.weights
        if o.dropout:
            self.model.set_dropout(o.dropout)
        ids = self.text[self.starts[:, None] + self.reach]
        loss, first, second, balance, *_ = self.model.losses(ids)
        total = loss + self.weigh[0] * first + self.weigh[1] * second + o.balance * balance
        grads = torch.autograd.grad(total, list(w.values()))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        good = torch.isfinite(norm)
        scale = torch.where(good, (o.clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        grads = [torch.where(good, g * scale, 0.0) for g in grads]
        with torch.no_grad():
            self.optimizer.step(dict(zip(w, grads, strict=True)))
        self.report += torch.stack([loss, first, second, balance, norm, (~good).float()]).detach()

    def step(self, starts, scale: float, number: int) -> None:
        self.starts.copy_(starts, non_blocking=True)
        self.optimizer.set(scale, number)
        self.graph.replay() if self.graph else self.compute()
        if CUDA:        # stay two steps ahead of the device and no more: the clock rules the schedule
            self.running.append(torch.cuda.Event())
            self.running[-1].record()
            if len(self.running) > 2:
                self.running.pop(0).synchronize()

    def averages(self, steps: int) -> list[float]:
        """Means of `report` over the steps since the last call; waits for the device."""
        values = (self.report / steps).tolist()
        self.report.zero_()
        return values

    def capture(self) -> None:
        """Record the step once, after it has run often enough to be compiled."""
        self.optimizer.settings[0] = 0.0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.graph = graph


class Order:
    """Where sequences start: every epoch another cut of the text and another order, from one seed."""

    def __init__(self, length: int, tokens: int, batch: int, seed: int):
        self.length, self.tokens, self.batch, self.seed, self.epoch, self.queue = length, tokens, batch, seed, 0, None

    def next(self):
        if self.queue is None or len(self.queue) < self.batch:
            random = np.random.default_rng([self.seed, self.epoch])
            first = int(random.integers(self.tokens))
            starts = np.arange(first, self.length - self.tokens - 2, self.tokens)
            self.queue = torch.from_numpy(random.permutation(starts)).to(DEVICE)
            self.epoch += 1
        taken, self.queue = self.queue[:self.batch], self.queue[self.batch:]
        return taken


# ---- evaluation ----------------------------------------------------------------------------------------------------

def evaluate(model: Model, text, text_bytes: int, end: int, limit: int | None = None) -> dict:
    """On held-out text: bits per byte (windows overlap by half, the later half counts, <|endoftext|> is not text) and
    the greedy acceptance of drafts. First: the block's guess is the trunk's. Second: among positions whose first draft
    is the trunk's guess (given_first) and the text's as well (so that the text is what would have been drafted)."""
    model.set_dropout(0.0)
    tokens, half = model.tokens, model.tokens // 2
    starts = torch.arange(0, len(text) - tokens - 2, half, device=DEVICE)[:limit]
    reach, head = torch.arange(tokens + 2, device=DEVICE), model.weights["output.weight"].detach()
    sums = torch.zeros(8, dtype=torch.float64, device=DEVICE)
    for i in range(0, len(starts), model.batch):
        real = starts[i:i + model.batch]
        padded = torch.cat([real, real[:1].expand(model.batch - len(real))])
        ids = text[padded[:, None] + reach].long()
        hidden, first, second = (t.detach() for t in model.losses(ids)[4:])
        for row in range(0, len(real), 8):      # logits of a few sequences at a time
            part = slice(row, min(row + 8, len(real)))
            counts = torch.ones(part.stop - part.start, tokens, dtype=torch.bool, device=DEVICE)
            counts[:, :half] = ((real[part] == 0)[:, None]).expand(-1, half)
            sums += count_batch(ids[part], *(linear(t[part], head) for t in (hidden, first, second)), counts, end)
    nats, text_tokens, drafts, first, seconds, second, exacts, exact = sums.tolist()
    share = text_tokens / int((text != end).sum())
    return {"bits_per_byte": nats / math.log(2) / (text_bytes * share), "nats_per_token": nats / text_tokens,
            "tokens": int(text_tokens), "first_draft": first / drafts, "second_given_first": second / max(seconds, 1),
            "second_given_first_and_text": exact / max(exacts, 1)}


def count_batch(ids, trunk, first, second, counts, end: int):
    tokens = trunk.shape[1]
    targets = ids[:, 1:tokens + 1]
    nats = F.cross_entropy(trunk.flatten(0, 1).float(), targets.flatten(), reduction="none").reshape(targets.shape)
    text = counts & (targets != end)
    said, first, second = (t.argmax(-1) for t in (trunk, first, second))
    ahead = said[:, 1:]                                                     # what the first draft at p should be
    hit1 = first[:, :-1] == ahead
    hit2 = second[:, 1:-1] == said[:, 2:]                                   # second draft made at p, stored at p + 1
    given, exact = hit1[:, :-1], hit1[:, :-1] & (ahead[:, :-1] == ids[:, 2:tokens])
    c1, c2 = counts[:, :-1], counts[:, :-2]
    return torch.stack([n.double().sum() for n in (
        nats * text, text, c1, hit1 & c1, given & c2, hit2 & given & c2, exact & c2, hit2 & exact & c2)])


# ---- the run -------------------------------------------------------------------------------------------------------

def schedule(done: float) -> float:
    """Learning rate relative to the peak when a share `done` of the time is over: warm up, hold, go down to zero."""
    return min(1.0, done / 0.01 + 0.02, max(0.0, (1 - done) / 0.6))


def build(options, tokens, batch: int, length: int, experts: str, compile: bool) -> Trainer:
    weights = initial_weights(options.seed)
    model = Model(weights, batch, length, experts, compile, options.soft)
    optimizer = Optimizer(weights, options.muon_lr, options.adam_lr, options.embed_lr, options.decay)
    trainer = Trainer(model, optimizer, tokens, options)
    trainer.weigh.copy_(torch.tensor([options.first, options.second]))
    return trainer


def check_kernels() -> None:
    """The Triton inverse against float64."""
    lower = (torch.randn(32, CHUNK, CHUNK, device=DEVICE) * 0.3).tril(-1)
    want = torch.linalg.inv(torch.eye(CHUNK, device=DEVICE, dtype=torch.float64) + lower.double())
    error = ((inverse_of_unit_lower(lower) - want).abs().max() / want.abs().max()).item()
    print(f"inverse: relative error {error:.1e}", flush=True)
    assert error < 1e-4, error


def warm(trainer: Trainer, order: Order, graph: bool) -> float:
    """Compile (two steps without effect) and capture; seconds."""
    begun = time.perf_counter()
    for _ in range(2):
        trainer.step(order.next(), 0.0, 1)
    for tensor in trainer.optimizer.state()[len(trainer.model.weights):]:
        tensor.zero_()
    if graph and CUDA:
        try:
            trainer.capture()
        except Exception as error:      # slower, but it trains
            print(f"no CUDA graph: {type(error).__name__}: {str(error)[:500]}", flush=True)
        for tensor in trainer.optimizer.state()[len(trainer.model.weights):]:
            tensor.zero_()
    trainer.averages(1)
    return time.perf_counter() - begun


def trial(options, tokens) -> None:
    """Tokens a second of several variants, seconds to compile, peak memory; then a profile of the last one's step."""
    for variant in options.variants.split(","):
        experts, shape, *flags = variant.split(":")
        batch, length = map(int, shape.split("x"))
        try:
            torch.compiler.reset()
            trainer = build(options, tokens, batch, length, experts, "eager" not in flags)
            order = Order(len(tokens), length, batch, options.seed)
            compiled = warm(trainer, order, "nograph" not in flags)
            begun, steps = time.perf_counter(), 0
            while time.perf_counter() - begun < options.trial_seconds:
                for _ in range(5):
                    steps += 1
                    trainer.step(order.next(), min(1.0, steps / 50), steps)
                losses = trainer.averages(5)
            rate = steps * batch * length / (time.perf_counter() - begun)
            memory = torch.cuda.max_memory_allocated() / 2 ** 30 if CUDA else 0
            print(f"{variant}: {rate:,.0f} tokens/s; {steps} steps, ready after {compiled:.0f} s, {memory:.1f} GiB, "
                  f"losses {' '.join(f'{x:.3f}' for x in losses)}", flush=True)
            if CUDA and "profile" in flags:
                profile(trainer, order)
        except Exception as error:
            print(f"{variant}: FAILED {type(error).__name__}: {str(error)[:1500]}", flush=True)
        trainer = None
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def profile(trainer: Trainer, order: Order) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.step(order.next(), 1.0, 1000)
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:28]
    total = sum(row.self_device_time_total for row in profiler.key_averages()) / 1000
    print(f"one step: {total:.1f} ms on the device")
    for row in rows:
        print(f"  {row.self_device_time_total / 1000:7.2f} ms {row.count:5d} x {row.key[:90]}", flush=True)


def train(options, tokens, heldout, heldout_bytes: int, end: int) -> None:
    folder = Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    log_file = open(folder / "log.jsonl", "a")
    print(json.dumps(vars(options)), f"{len(tokens):,} tokens", flush=True)
    trainer = build(options, tokens, options.batch, options.sequence, options.experts, not options.eager)
    model, optimizer = trainer.model, trainer.optimizer
    order = Order(len(tokens), options.sequence, options.batch, options.seed)
    print(f"compiled in {warm(trainer, order, not options.no_graph):.0f} s", flush=True)
    begun = time.perf_counter()
    budget = 60 * options.minutes - (begun - options.started) - options.reserve
    step, marks, dims, good = 0, [begun, begun, begun, 0], 1.0, [t.clone() for t in optimizer.state()]

    def log(**values) -> None:
        line = json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in values.items()})
        print(line, flush=True)
        log_file.write(line + "\n")
        log_file.flush()

    def save(name: str, **more) -> None:
        about = {"step": step, "tokens": step * options.batch * options.sequence, "epochs": order.epoch,
                 "options": vars(options), **more}
        save_parts(folder / name, in_file_form(model.weights), about)

    while True:
        now = time.perf_counter()
        done = max((now - begun) / budget, step / options.steps if options.steps else 0.0)
        if done >= 1:
            break
        step += 1
        scale = dims * schedule(done)
        trainer.step(order.next(), scale, step)
        if now - marks[0] >= options.log_seconds or step == 1 or (options.steps and step % 10 == 0):
            losses = trainer.averages(step - marks[3])
            now = time.perf_counter()
            rate = (step - marks[3]) * options.batch * options.sequence / (now - marks[0])
            log(step=step, seconds=now - begun, tokens=step * options.batch * options.sequence,
                tokens_per_second=round(rate), epoch=order.epoch, loss=losses[0], first=losses[1], second=losses[2],
                balance=losses[3], gradient=losses[4], bad_steps=losses[5], lr=scale)
            marks[0], marks[3] = now, step
            if not all(map(math.isfinite, losses[:4])):     # start again from the last good state, more carefully
                dims *= 0.5
                for tensor, kept in zip(optimizer.state(), good, strict=True):
                    tensor.data.copy_(kept)
            else:
                for tensor, kept in zip(optimizer.state(), good, strict=True):
                    kept.copy_(tensor.detach())
        if now - marks[1] >= options.save_minutes * 60:
            save("checkpoint")
            marks[1] = time.perf_counter()
        if now - marks[2] >= options.eval_minutes * 60:
            log(step=step, heldout=evaluate(model, heldout, heldout_bytes, end, options.batch * 2))
            marks[2] = time.perf_counter()
    save("final")
    result = evaluate(model, heldout, heldout_bytes, end, None if CUDA else 2 * options.batch)
    log(step=step, tokens=step * options.batch * options.sequence, epochs=order.epoch,
        seconds=time.perf_counter() - begun, heldout=result)
    save("final", heldout=result, device=torch.cuda.get_device_name() if CUDA else "CPU")
    print("done", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--corpus", default="build/corpus")
    add("--cache", default="/tmp/minillama-tokens")
    add("--out", default="/tmp/run")
    add("--minutes", type=float, default=24, help="wall time from the start of this program to its end")
    add("--reserve", type=float, default=40, help="seconds of it for the last evaluation and saving")
    add("--steps", type=int, default=0, help="end after so many steps at the latest")
    add("--batch", type=int, default=64)
    add("--sequence", type=int, default=1024)
    add("--experts", choices=("dense", "grouped"), default="dense")
    add("--eager", action="store_true")
    add("--no-graph", action="store_true")
    add("--muon-lr", type=float, default=5e-3)
    add("--adam-lr", type=float, default=3e-3)
    add("--embed-lr", type=float, default=1e-2)
    add("--decay", type=float, default=0.1, help="weight decay of the matrices under Muon, times its learning rate")
    add("--dropout", type=float, default=0.1, help="of what each mixer and each experts layer adds")
    add("--clip", type=float, default=1.0)
    add("--first", type=float, default=0.3, help="weight of the first draft's loss")
    add("--second", type=float, default=0.15)
    add("--soft", type=float, default=0.5, help="share of the draft losses against the trunk's distribution")
    add("--balance", type=float, default=0.01)
    add("--seed", type=int, default=0)
    add("--log-seconds", type=float, default=20)
    add("--save-minutes", type=float, default=6)
    add("--eval-minutes", type=float, default=3)
    add("--trial", action="store_true")
    add("--trial-seconds", type=float, default=8)
    add("--variants", default="dense:64x1024:profile,grouped:64x1024,dense:128x1024")
    add("--import-parts", type=Path, metavar="DIR")
    add("--gguf", type=Path)
    add("--format", default="F32")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    if options.import_parts:
        vocabulary = Path(options.corpus) / "tokenizer.json"
        return import_parts(options.import_parts, options.gguf, vocabulary, options.format)
    options.started = time.perf_counter()
    torch.manual_seed(options.seed)
    corpus, cache = Path(options.corpus), Path(options.cache)
    (train_text, _), (heldout, heldout_bytes) = (load_tokens(corpus, name, cache) for name in ("train", "heldout"))
    print(f"{len(train_text):,} tokens to train on, {len(heldout):,} held out, "
          f"{time.perf_counter() - options.started:.0f} s; "
          f"{torch.cuda.get_device_name() if CUDA else 'CPU'}, torch {torch.__version__}", flush=True)
    end = int(heldout[-1])
    check_kernels()
    train_text, heldout = (torch.from_numpy(t).to(DEVICE) for t in (train_text, heldout))
    if options.trial:
        trial(options, train_text)
    else:
        train(options, train_text, heldout, heldout_bytes, end)


if __name__ == "__main__":
    main()
