"""Writes small model files with the `gguf` package, whole or deliberately wrong: the tests' raw material."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, ROPE_DIM = 64, 2, 1, 32, 8
K_HEADS, V_HEADS, STATE_DIM, CONV_WIDTH = 2, 4, 16, 4
EXPERTS, EXPERTS_USED, EXPERT_WIDTH, SHARED_WIDTH = 4, 2, 32, 32
KEY_WIDTH, VALUE_WIDTH = K_HEADS * STATE_DIM, V_HEADS * STATE_DIM
CONTEXT = 512
INTERVAL = 4
MERGES = ["t h", "i n", "th e", "e r", "o n", "in g", "Ġ the"]
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tiny_model(
    path: str | Path,
    *,
    seed: int = 0,
    layers: int = 4,
    mtp: bool = True,
    format: str = "F32",
    drop: Collection[str] = (),
    rename: Mapping[str, str] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    extra: Mapping[str, tuple[int, ...]] | None = None,
    metadata_overrides: Mapping[str, Any] | None = None,
    alignment: int | None = None,
    split_max_tensors: int = 0,
) -> dict[str, np.ndarray]:
    """Writes a Qwen3-Next model of random weights to `path`; returns the values of its tensors before packing.

    `drop` leaves out tensors or metadata keys; `rename` renames tensors; `shapes` gives tensors another shape; `extra`
    adds tensors. `metadata_overrides` changes or adds keys: value or `(gguf.GGUFValueType, value)`; None removes it.
    `format` packs the matrices (those of the `gguf` package's writers whose rows divide; the rest is F16).
    `split_max_tensors` writes shards `{stem}-00001-of-0000n.gguf` beside `path` in place of one file.
    """
    rng = np.random.default_rng(seed)
    wanted = tensor_shapes(layers, mtp) | dict(shapes or {}) | dict(extra or {})
    values = {name: random_values(name, shape, rng) for name, shape in wanted.items() if name not in drop}
    values = {(rename or {}).get(name, name): array for name, array in values.items()}
    writer = gguf.GGUFWriter(path, "qwen3next", split_max_tensors=split_max_tensors)
    add_metadata(writer, metadata(layers, mtp) | dict(metadata_overrides or {}), drop)
    if alignment:
        writer.add_custom_alignment(alignment)
    for name, array in values.items():
        packed, code = pack(name, array, format)
        writer.add_tensor(name, packed, raw_dtype=code)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def tensor_shapes(layers: int, mtp: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor's name and shape, written out independently of `minillama.config`."""
    vocab = len(vocabulary())
    shapes = {
        "output.weight": (vocab, HIDDEN),
        "output_norm.weight": (HIDDEN,),
        "token_embd.weight": (vocab, HIDDEN),
    }
    for i in range(layers + mtp):
        parts = dict(MOE)
        parts |= DELTA_NET if is_recurrent(i, layers) else ATTENTION
        if i >= layers:
            parts |= MTP
        shapes |= {f"blk.{i}.{name}": shape for name, shape in sorted(parts.items())}
    return shapes


def is_recurrent(i: int, layers: int) -> bool:
    return i < layers and (i + 1) % INTERVAL != 0


DELTA_NET = {
    "attn_qkv.weight": (2 * KEY_WIDTH + VALUE_WIDTH, HIDDEN),
    "attn_gate.weight": (VALUE_WIDTH, HIDDEN),
    "ssm_ba.weight": (2 * V_HEADS, HIDDEN),
    "ssm_conv1d.weight": (2 * KEY_WIDTH + VALUE_WIDTH, CONV_WIDTH),
    "ssm_dt.bias": (V_HEADS,),
    "ssm_a": (V_HEADS,),
    "ssm_norm.weight": (STATE_DIM,),
    "ssm_out.weight": (HIDDEN, VALUE_WIDTH),
}
ATTENTION = {
    "attn_q.weight": (2 * HEADS * HEAD_DIM, HIDDEN),
    "attn_k.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_v.weight": (KV_HEADS * HEAD_DIM, HIDDEN),
    "attn_output.weight": (HIDDEN, HEADS * HEAD_DIM),
    "attn_q_norm.weight": (HEAD_DIM,),
    "attn_k_norm.weight": (HEAD_DIM,),
}
MOE = {
    "attn_norm.weight": (HIDDEN,),
    "post_attention_norm.weight": (HIDDEN,),
    "ffn_gate_inp.weight": (EXPERTS, HIDDEN),
    "ffn_gate_exps.weight": (EXPERTS, EXPERT_WIDTH, HIDDEN),
    "ffn_up_exps.weight": (EXPERTS, EXPERT_WIDTH, HIDDEN),
    "ffn_down_exps.weight": (EXPERTS, HIDDEN, EXPERT_WIDTH),
    "ffn_gate_inp_shexp.weight": (HIDDEN,),
    "ffn_gate_shexp.weight": (SHARED_WIDTH, HIDDEN),
    "ffn_up_shexp.weight": (SHARED_WIDTH, HIDDEN),
    "ffn_down_shexp.weight": (HIDDEN, SHARED_WIDTH),
}
MTP = {
    "nextn.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
    "nextn.enorm.weight": (HIDDEN,),
    "nextn.hnorm.weight": (HIDDEN,),
    "nextn.shared_head_norm.weight": (HIDDEN,),
}


def metadata(layers: int, mtp: bool) -> dict[str, Any]:
    """Keys as llama.cpp's converter writes them; integers become UINT32 and floats FLOAT32 in the file."""
    arch = {
        "block_count": layers + mtp,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.recurrent_layers": [is_recurrent(i, layers) for i in range(layers + mtp)],
        "rope.freq_base": 10000.0,
        "rope.dimension_count": ROPE_DIM,
        "expert_count": EXPERTS,
        "expert_used_count": EXPERTS_USED,
        "expert_feed_forward_length": EXPERT_WIDTH,
        "expert_shared_feed_forward_length": SHARED_WIDTH,
        "nextn_predict_layers": int(mtp),
        "ssm.conv_kernel": CONV_WIDTH,
        "ssm.state_size": STATE_DIM,
        "ssm.group_count": K_HEADS,
        "ssm.time_step_rank": V_HEADS,
        "ssm.inner_size": VALUE_WIDTH,
        "full_attention_interval": INTERVAL,
    }
    tokens = vocabulary()
    return {
        "general.name": "Tiny",
        **{f"qwen3next.{key}": value for key, value in arch.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in SPECIALS else 1 for token in tokens],
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.chat_template": TEMPLATE,
    }


def vocabulary() -> list[str]:
    """The 256 bytes in GPT-2's printable spelling, a token for each merge, and the special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    shifted = [256 + i for i in range(256 - len(printable))]
    return [chr(c) for c in printable + shifted] + [merge.replace(" ", "") for merge in MERGES] + SPECIALS


def add_metadata(writer: gguf.GGUFWriter, values: Mapping[str, Any], drop: Collection[str] = ()) -> None:
    for key, value in values.items():
        if key in drop or value is None:
            writer.kv_data[0].pop(key, None)
            continue
        if key == "general.architecture":
            writer.kv_data[0].pop(key)
        kind, value = value if isinstance(value, tuple) else (gguf.GGUFValueType.get_type(value), value)
        kind = gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 and value >= 0 else kind
        writer.add_key_value(key, value, kind)


def random_values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Weights of a plausible size: norms near 1, decays below 0, matrices that keep the scale of their input."""
    noise = rng.standard_normal(shape).astype(np.float32)
    if name.endswith("norm.weight"):
        return 1 + noise / 10
    if name.endswith("ssm_a"):
        return -np.exp(noise / 2)
    return noise / np.sqrt(shape[-1], dtype=np.float32)


def pack(name: str, array: np.ndarray, format: str) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Matrices in `format`, or F16 where their rows do not divide; small tensors and sensitive ones stay F32."""
    kept = array.ndim == 1 or name.endswith(("ssm_conv1d.weight", "ffn_gate_inp.weight"))
    code = gguf.GGMLQuantizationType["F32" if kept else format]
    if array.shape[-1] % gguf.GGML_QUANT_SIZES[code][0]:
        code = gguf.GGMLQuantizationType.F16
    return gguf.quants.quantize(array, code), code
