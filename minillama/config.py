"""ModelConfig: the numbers that define one Qwen3-Next model, read from a file's metadata and checked.

What is not consistent, or not plausible, is refused here, so that the engine need not doubt any of it. Which tensors a
model of these numbers needs, and in which shapes, stands in `expected_tensors`.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from minillama.gguf import GGUF, GGUFError

ARCHITECTURES = ("qwen3next",)
DEFAULT_INTERVAL = 4  # files of llama.cpp's first support (#16095) carry neither interval nor list
MAX_LAYERS = 1 << 12
MAX_CONV = 9        # taps: the ring of the convolution's inputs (kernels.delta.HISTORY) holds drafts besides
MAX_LENGTH = 1 << 24  # a context or vocabulary above 16 million is a damaged number


@dataclass(frozen=True)
class ModelConfig:
    """Sizes count values or heads; `recurrent` is True for Gated DeltaNet layers, False for attention layers."""

    name: str
    layers: int  # of the trunk, the MTP block excluded
    mtp_blocks: int
    context: int  # tokens
    hidden: int
    vocab: int
    norm_eps: float
    heads: int  # gated attention: query heads
    kv_heads: int
    head_dim: int
    rope_dim: int  # the first of head_dim that are rotated
    rope_base: float
    k_heads: int  # Gated DeltaNet: query and key heads
    v_heads: int
    state_dim: int  # of every delta head
    conv_width: int  # tokens
    experts: int
    experts_used: int
    expert_width: int
    shared_width: int
    recurrent: tuple[bool, ...]

    @property
    def key_width(self) -> int:
        return self.k_heads * self.state_dim

    @property
    def value_width(self) -> int:
        return self.v_heads * self.state_dim

    @property
    def conv_channels(self) -> int:
        return 2 * self.key_width + self.value_width

    @classmethod
    def from_gguf(cls, file: GGUF) -> "ModelConfig":
        """Raises GGUFError where a key is missing, of a wrong type, absurd, or at odds with another."""
        keys = _Keys(file)
        blocks = keys.integer("block_count", high=MAX_LAYERS)
        mtp_blocks = keys.integer("nextn_predict_layers", low=0, high=min(blocks - 1, 1), default=0)
        _check_rope_scaling(keys)
        config = cls(
            name=_name(file),
            layers=blocks - mtp_blocks,
            mtp_blocks=mtp_blocks,
            context=keys.integer("context_length", high=MAX_LENGTH),
            hidden=keys.integer("embedding_length"),
            vocab=_vocab(file),
            norm_eps=keys.real("attention.layer_norm_rms_epsilon", 1e-12, 1e-2),
            heads=keys.integer("attention.head_count"),
            kv_heads=keys.integer("attention.head_count_kv"),
            head_dim=keys.integer("attention.key_length"),
            rope_dim=keys.integer("rope.dimension_count"),
            rope_base=keys.real("rope.freq_base", 1.0, 1e12),
            k_heads=keys.integer("ssm.group_count"),
            v_heads=keys.integer("ssm.time_step_rank"),
            state_dim=keys.integer("ssm.state_size"),
            conv_width=keys.integer("ssm.conv_kernel", low=2, high=MAX_CONV),
            experts=keys.integer("expert_count"),
            experts_used=keys.integer("expert_used_count"),
            expert_width=keys.integer("expert_feed_forward_length"),
            shared_width=keys.integer("expert_shared_feed_forward_length"),
            recurrent=_recurrent(keys, blocks, blocks - mtp_blocks),
        )
        _check_consistent(keys, config)
        return config


class _Keys:
    """Metadata under the architecture's prefix, each value checked for type and range."""

    def __init__(self, file: GGUF):
        self.file = file
        self.arch = file.metadata.get("general.architecture")
        if self.arch not in ARCHITECTURES:
            supported = ", ".join(ARCHITECTURES)
            raise GGUFError(f"{file.path}: unknown architecture {self.arch!r:.60}; supported: {supported}")

    def fail(self, key: str, problem: str) -> GGUFError:
        return GGUFError(f"{self.file.path}: metadata key '{self.arch}.{key}' {problem}")

    def get(self, key: str, default: Any = None) -> Any:
        value = self.file.metadata.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.fail(key, "is missing")
        return value

    def integer(self, key: str, low: int = 1, high: int = 1 << 31, default: int | None = None) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool):
            raise self.fail(key, f"is {value!r:.40}, not an integer")
        if not low <= value <= high:
            raise self.fail(key, f"is {value}, not from {low} to {high}")
        return value

    def real(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.fail(key, f"is {value!r:.40}, not a number")
        if not (math.isfinite(value) and low <= value <= high):
            raise self.fail(key, f"is {value}, not from {low:g} to {high:g}")
        return float(value)


def _name(file: GGUF) -> str:
    name = file.metadata.get("general.name", file.path.stem)
    if not isinstance(name, str):
        raise GGUFError(f"{file.path}: metadata key 'general.name' is {name!r:.40}, not a string")
    return name


def _vocab(file: GGUF) -> int:
    """Rows of the embedding; the vocabulary, where the file has one, must have as many entries."""
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    table = file.tensors.get("token_embd.weight")
    if tokens is None and table is None:
        raise GGUFError(f"{file.path}: neither tensor 'token_embd.weight' nor 'tokenizer.ggml.tokens': no vocabulary")
    if tokens is not None and not (isinstance(tokens, list) and tokens and isinstance(tokens[0], str)):
        raise GGUFError(f"{file.path}: metadata key 'tokenizer.ggml.tokens' is not a list of strings")
    vocab = len(tokens) if table is None else table.shape[0]
    entries = vocab if tokens is None else len(tokens)
    if vocab > MAX_LENGTH or entries != vocab:
        raise GGUFError(f"{file.path}: 'token_embd.weight' has {vocab} rows, the vocabulary {entries} entries")
    return vocab


def _check_rope_scaling(keys: _Keys) -> None:
    """A stretched context would change the rotary angles; the engine does not stretch, so it must not pretend."""
    kind = keys.get("rope.scaling.type", "linear")  # what llama.cpp takes a factor without a type to mean
    factor = keys.real("rope.scaling.factor", 0.0, math.inf, default=1.0)
    if kind not in ("none", "linear") or (kind == "linear" and factor not in (0.0, 1.0)):
        raise keys.fail("rope.scaling.type", f"is {kind!r:.40} with factor {factor:g}: rope scaling is not supported")


def _recurrent(keys: _Keys, blocks: int, layers: int) -> tuple[bool, ...]:
    """From the list `attention.recurrent_layers` (trunk layers or all blocks), else `full_attention_interval`."""
    interval = keys.integer("full_attention_interval", high=MAX_LAYERS, default=DEFAULT_INTERVAL)
    flags = keys.get("attention.recurrent_layers", [(i + 1) % interval != 0 for i in range(layers)])
    if not isinstance(flags, list) or not all(flag in (0, 1) for flag in flags):
        raise keys.fail("attention.recurrent_layers", "is not a list of truth values")
    if len(flags) not in (layers, blocks):
        raise keys.fail("attention.recurrent_layers", f"has {len(flags)} entries for {layers} layers, {blocks} blocks")
    if any(flags[layers:]):
        raise keys.fail("attention.recurrent_layers", "calls an MTP block recurrent; MTP blocks have attention")
    return tuple(bool(flag) for flag in flags[:layers])


def _check_consistent(keys: _Keys, config: ModelConfig) -> None:
    """What one number demands of another."""
    c = config
    value_length = keys.integer("attention.value_length", default=c.head_dim)
    inner = keys.integer("ssm.inner_size", default=c.value_width)
    for holds, key, problem in (
        (c.heads % c.kv_heads == 0, "attention.head_count_kv", f"is {c.kv_heads}: {c.heads} heads cannot share them"),
        (value_length == c.head_dim, "attention.value_length", f"is {value_length}, the key length {c.head_dim}"),
        (c.rope_dim <= c.head_dim, "rope.dimension_count", f"is {c.rope_dim}, above the head's {c.head_dim}"),
        (c.rope_dim % 2 == 0, "rope.dimension_count", f"is {c.rope_dim}, which is odd"),
        (c.v_heads % c.k_heads == 0, "ssm.group_count", f"is {c.k_heads}: {c.v_heads} value heads cannot share them"),
        (inner == c.value_width, "ssm.inner_size", f"is {inner}, not {c.v_heads} value heads of {c.state_dim}"),
        (c.experts_used <= c.experts, "expert_used_count", f"is {c.experts_used} of {c.experts} experts"),
    ):
        if not holds:
            raise keys.fail(key, problem)


def expected_tensors(config: ModelConfig, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """Name → shape (rows × columns) of every tensor that the model needs, MTP block included.

    `names` are the tensors of the file: they decide between `attn_qkv` + `attn_gate` and the older fused `ssm_in`, and
    whether `output.weight` (else the embedding serves as head) and the MTP block's own embedding and head belong.
    """
    c = config
    shapes = {"token_embd.weight": (c.vocab, c.hidden), "output_norm.weight": (c.hidden,)}
    optional = {"output.weight": (c.vocab, c.hidden)}
    for i in range(c.layers + c.mtp_blocks):
        block = f"blk.{i}."
        mixer = _delta_net_tensors(c, f"{block}ssm_in.weight" in names) if i < c.layers and c.recurrent[i] else None
        parts = _moe_tensors(c) | (_attention_tensors(c) if mixer is None else mixer)
        if i >= c.layers:
            parts |= _mtp_tensors(c)
            optional[f"{block}nextn.embed_tokens.weight"] = (c.vocab, c.hidden)
            optional[f"{block}nextn.shared_head_head.weight"] = (c.vocab, c.hidden)
        shapes |= {block + part: shape for part, shape in parts.items()}
    return shapes | {name: shape for name, shape in optional.items() if name in names}


def _delta_net_tensors(c: ModelConfig, fused: bool) -> dict[str, tuple[int, ...]]:
    projections = {"attn_qkv.weight": (c.conv_channels, c.hidden), "attn_gate.weight": (c.value_width, c.hidden)}
    if fused:  # q, k, v, z in one, grouped per key head: files older than llama.cpp #18683
        projections = {"ssm_in.weight": (c.conv_channels + c.value_width, c.hidden)}
    return projections | {
        "ssm_ba.weight": (2 * c.v_heads, c.hidden),
        "ssm_conv1d.weight": (c.conv_channels, c.conv_width),
        "ssm_dt.bias": (c.v_heads,),
        "ssm_a": (c.v_heads,),
        "ssm_norm.weight": (c.state_dim,),
        "ssm_out.weight": (c.hidden, c.value_width),
    }


def _attention_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        "attn_q.weight": (2 * c.heads * c.head_dim, c.hidden),  # per head: query, gate
        "attn_k.weight": (c.kv_heads * c.head_dim, c.hidden),
        "attn_v.weight": (c.kv_heads * c.head_dim, c.hidden),
        "attn_output.weight": (c.hidden, c.heads * c.head_dim),
        "attn_q_norm.weight": (c.head_dim,),
        "attn_k_norm.weight": (c.head_dim,),
    }


def _moe_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        "attn_norm.weight": (c.hidden,),
        "post_attention_norm.weight": (c.hidden,),
        "ffn_gate_inp.weight": (c.experts, c.hidden),
        "ffn_gate_exps.weight": (c.experts, c.expert_width, c.hidden),
        "ffn_up_exps.weight": (c.experts, c.expert_width, c.hidden),
        "ffn_down_exps.weight": (c.experts, c.hidden, c.expert_width),
        "ffn_gate_inp_shexp.weight": (c.hidden,),
        "ffn_gate_shexp.weight": (c.shared_width, c.hidden),
        "ffn_up_shexp.weight": (c.shared_width, c.hidden),
        "ffn_down_shexp.weight": (c.hidden, c.shared_width),
    }


def _mtp_tensors(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        "nextn.eh_proj.weight": (c.hidden, 2 * c.hidden),
        "nextn.enorm.weight": (c.hidden,),
        "nextn.hnorm.weight": (c.hidden,),
        "nextn.shared_head_norm.weight": (c.hidden,),
    }


def check_tensors(file: GGUF, config: ModelConfig) -> None:
    """Every tensor the model needs is there in its shape, and none that it would silently leave out; else GGUFError.

    Lengths of 1 in front do not count: float32 files store `ffn_gate_inp_shexp` as (1, hidden).
    """
    expected = expected_tensors(config, file.tensors)
    for name, shape in expected.items():
        if name not in file.tensors:
            raise GGUFError(f"{file.path}: tensor '{name}' {shape} is missing")
        found = file.tensors[name].shape
        if _without_ones(found) != _without_ones(shape):
            raise GGUFError(f"{file.path}: tensor '{name}' has shape {found}, expected {shape}")
    for name in file.tensors:
        if name not in expected:
            raise GGUFError(f"{file.path}: tensor {name!r:.80} is not part of a {ARCHITECTURES[0]} model of its shape")


def _without_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    return next((shape[i:] for i, length in enumerate(shape) if length > 1), shape[-1:])
