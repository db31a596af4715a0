"""The weights under their names in the GGUF file, and the model's sizes. Only ssm_a is trained in another form."""
import math

import numpy as np
import torch

from training.device import DEVICE

VOCAB, HIDDEN, LAYERS, EPS = 4096, 256, 8, 1e-6
HEADS, KV_HEADS, HEAD_DIM, ROPE_DIM, ROPE_BASE = 4, 2, 64, 16, 1e4
K_HEADS, V_HEADS, STATE_DIM, CONV = 2, 4, 64, 4
EXPERTS, USED, WIDTH, SHARED = 16, 4, 128, 256
KEY, VALUE = K_HEADS * STATE_DIM, V_HEADS * STATE_DIM


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
