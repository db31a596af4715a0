"""A model of ours as a GGUF file: metadata and tensors as llama.cpp's converter writes them for `qwen3next`.

Tensors are given under their names in the file and in its conventions: norm weights hold the "+1", `ssm_a` is
-exp(A_log), `ssm_ba` lies per key head as [b b | a a], the MTP block is the last block.
"""

import json
import os
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from minillama.config import ARCHITECTURES, ModelConfig, expected_tensors
from minillama.quantize import QUANTIZATION_VERSION, quantize
from minillama.tokenizer import CHATML, CONTROL

INTERVAL = 4  # every fourth layer has attention
NORMAL = 1  # tokenizer.ggml.token_type; CONTROL entries are matched whole
END_OF_DOCUMENT = "<|endoftext|>"
FILE_TYPE_F32 = 0


def model_config(name: str, vocab: int = 4096, **changes: Any) -> ModelConfig:
    """The shipped model's numbers (about 20 M parameters) but for `changes`, which name fields of ModelConfig."""
    numbers = dict(
        layers=8, mtp_blocks=1, context=4096, hidden=256, norm_eps=float(np.float32(1e-6)),
        heads=4, kv_heads=2, head_dim=64, rope_dim=16, rope_base=1e4,
        k_heads=2, v_heads=4, state_dim=64, conv_width=4,
        experts=16, experts_used=4, expert_width=128, shared_width=256,
    ) | changes
    recurrent = tuple((i + 1) % INTERVAL != 0 for i in range(numbers["layers"]))
    return ModelConfig(name=name, vocab=vocab, recurrent=recurrent, **numbers)


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor that `write_model` wants: the output head has weights of its own."""
    return expected_tensors(config, ("output.weight",))


def write_model(path: str | Path, config: ModelConfig, tensors: dict[str, np.ndarray], tokenizer_json: str | Path, *,
                name: str, format: str = "F32") -> None:
    """Writes a GGUF file, which appears when it is whole.

    `tensors`: name → float32 values, exactly those of `tensor_shapes(config)`, else ValueError; `tokenizer_json`: a
    byte-level BPE with Qwen2's way of cutting words, saved by the `tokenizers` library; `format`: of quantize.TARGETS.
    """
    path = Path(path)
    _check_tensors(config, tensors)
    plain = path.with_name(f".{path.name}.{os.getpid()}.f32")
    try:
        _write_f32(plain, metadata(config, name) | tokenizer_metadata(tokenizer_json, config.vocab), tensors)
        if format == "F32":
            os.replace(plain, path)
        else:
            quantize(plain, path, format)
    finally:
        plain.unlink(missing_ok=True)


def _check_tensors(config: ModelConfig, tensors: dict[str, np.ndarray]) -> None:
    shapes = tensor_shapes(config)
    if odd := sorted(shapes.keys() ^ tensors.keys()):
        raise ValueError(f"{len(odd)} tensors are missing or not part of the model, the first is '{odd[0]}'")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise ValueError(f"tensor '{name}' has shape {tensors[name].shape}, expected {shape}")
        if not np.isfinite(tensors[name]).all():
            raise ValueError(f"tensor '{name}' holds values that are not finite")


def _write_f32(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    writer = gguf.GGUFWriter(path, ARCHITECTURES[0])  # writes general.architecture
    try:
        for key, value in (keys | {"general.size_label": size_label(tensors)}).items():
            kind, element = _types(value)
            writer.add_key_value(key, value, kind, sub_type=element)
        for name, values in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(values, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _types(value: Any) -> tuple[gguf.GGUFValueType, gguf.GGUFValueType | None]:
    """The converter's types: sizes are unsigned, the elements of lists are not."""
    kind = gguf.GGUFValueType.get_type(value)
    if kind == gguf.GGUFValueType.ARRAY:
        return kind, gguf.GGUFValueType.get_type(value[0])
    return (gguf.GGUFValueType.UINT32 if kind == gguf.GGUFValueType.INT32 else kind), None


def size_label(tensors: dict[str, np.ndarray]) -> str:
    """"16x1.5M": the number of experts, and the parameters with one expert per layer; as the converter counts."""
    routed = {name: values.shape for name, values in tensors.items() if "_exps." in name}
    experts = next(iter(routed.values()))[0]
    one_expert = sum(prod(shape[1:]) for shape in routed.values())
    total = sum(values.size for values in tensors.values())
    return gguf.size_label(total, total - experts * one_expert, one_expert, experts)


def metadata(config: ModelConfig, name: str) -> dict[str, Any]:
    """Every key but the vocabulary's, in the converter's order."""
    c = config
    numbers = {
        "block_count": c.layers + c.mtp_blocks,
        "context_length": c.context,
        "embedding_length": c.hidden,
        "feed_forward_length": c.experts_used * c.expert_width,  # of a dense layer; the family has none
        "attention.head_count": c.heads,
        "attention.head_count_kv": c.kv_heads,
        "rope.freq_base": float(c.rope_base),
        "attention.layer_norm_rms_epsilon": c.norm_eps,
        "expert_count": c.experts,
        "expert_used_count": c.experts_used,
        "attention.key_length": c.head_dim,
        "attention.value_length": c.head_dim,
        "expert_feed_forward_length": c.expert_width,
        "expert_shared_feed_forward_length": c.shared_width,
        "nextn_predict_layers": c.mtp_blocks,
        "ssm.conv_kernel": c.conv_width,
        "ssm.state_size": c.state_dim,
        "ssm.group_count": c.k_heads,
        "ssm.time_step_rank": c.v_heads,
        "ssm.inner_size": c.value_width,
        "attention.recurrent_layers": [*c.recurrent, *[False] * c.mtp_blocks],
        "full_attention_interval": INTERVAL,
        "rope.dimension_count": c.rope_dim,
    }
    return {
        "general.type": "model",
        "general.name": name,
        "general.size_label": "",  # filled in when the tensors are known
        "general.file_type": FILE_TYPE_F32,
        **{f"{ARCHITECTURES[0]}.{key}": value for key, value in numbers.items()},
        "general.quantization_version": QUANTIZATION_VERSION,
    }


def tokenizer_metadata(tokenizer_json: str | Path, vocab: int) -> dict[str, Any]:
    """The vocabulary's keys. A text ends, and is padded, with <|endoftext|>, the token between training documents."""
    file = json.loads(Path(tokenizer_json).read_text(encoding="utf-8"))
    specials = {entry["content"]: entry["id"] for entry in file["added_tokens"]}
    ids = file["model"]["vocab"] | specials
    tokens = sorted(ids, key=ids.get)
    if sorted(ids.values()) != list(range(vocab)):
        raise ValueError(f"{tokenizer_json}: {len(ids)} entries do not number a vocabulary of {vocab}")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in file["model"]["merges"]]
    end = specials[END_OF_DOCUMENT]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in specials else NORMAL for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.padding_token_id": end,
        "tokenizer.ggml.bos_token_id": end,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHATML,
    }
