"""Weights: from a checked GGUF file to tensors on the device, one record per part of the model.

Rows are put into the order in which the engine reads them here, once, so that no step has to un-permute anything
(llama.cpp #18683 moved the same work from its graph into the conversion).
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from tinygrad import Tensor

from minillama.blocks import Format, unpack
from minillama.config import ModelConfig
from minillama.gguf import GGUF
from minillama.kernels.layouts import OCTET
from minillama.kernels.packed import Packed

Weight = Tensor | Packed        # plain float values, or a file's blocks


@dataclass(frozen=True)
class DeltaNetWeights:
    """A Gated DeltaNet mixer. `inputs`: rows of [q|k|v], z, b, a, as four weights or stacked where formats agree."""
    inputs: tuple[Weight, ...]      # (conv_channels, hidden), (value_width, hidden), (v_heads, hidden) twice
    conv: Tensor                    # (conv_channels, conv_width)
    dt_bias: Tensor                 # (v_heads,)
    a: Tensor                       # (v_heads,): -exp(A_log)
    norm: Tensor                    # (state_dim,)
    out: Weight                     # (hidden, value_width)


@dataclass(frozen=True)
class AttentionWeights:
    """A gated attention mixer. `inputs`: rows of q (per head [query|gate]), k, v, three weights or fewer."""
    inputs: tuple[Weight, ...]      # (2 * heads * head_dim, hidden), (kv_heads * head_dim, hidden) twice
    q_norm: Tensor                  # (head_dim,)
    k_norm: Tensor                  # (head_dim,)
    out: Weight                     # (hidden, heads * head_dim)


@dataclass(frozen=True)
class ExpertWeights:
    """A router, its experts and the shared expert. `gate_up` and `shared_inputs`: two weights each, or one;
    packed ones are two, which the kernels read side by side."""
    router: Weight                  # (experts, hidden)
    gate_up: tuple[Weight, ...]     # (experts, expert_width, hidden) twice, or (experts, 2 * expert_width, hidden)
    down: Weight                    # (experts, hidden, expert_width)
    shared_gate: Tensor             # (hidden,)
    shared_inputs: tuple[Weight, ...]   # (shared_width, hidden) twice, or (2 * shared_width, hidden)
    shared_down: Weight             # (hidden, shared_width)

    def pair(self) -> tuple[Weight, ...]:
        """Gate and up apart, (experts, expert_width, hidden) each: views, however they are stored."""
        return self.gate_up if len(self.gate_up) == 2 else tuple(self.gate_up[0].chunk(2, dim=1))


@dataclass(frozen=True)
class LayerWeights:
    """One layer: x += mixer(norm(x)), then x += experts(post_norm(x))."""
    norm: Tensor                    # (hidden,)
    mixer: DeltaNetWeights | AttentionWeights
    post_norm: Tensor               # (hidden,)
    experts: ExpertWeights


@dataclass(frozen=True)
class MTPWeights:
    """The multi-token-prediction block: two norms and a projection, then one attention layer, then a norm."""
    embed_norm: Tensor              # (hidden,)
    hidden_norm: Tensor             # (hidden,)
    project: Weight                 # (hidden, 2 * hidden): reads [embedding | hidden state]
    layer: LayerWeights
    out_norm: Tensor                # (hidden,)
    embed: Weight                   # (vocab, hidden): the model's own unless the file has one for the block
    head: Weight                    # (vocab, hidden): likewise


@dataclass(frozen=True)
class ModelWeights:
    """The whole model. `mtp` is None where the file has no such block."""
    embed: Weight                   # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    out_norm: Tensor                # (hidden,)
    head: Weight                    # (vocab, hidden)
    mtp: MTPWeights | None


@dataclass(frozen=True)
class Rows:
    """Rows of a file's tensor, some or all, as they lie in the file: `raw` (..., rows, bytes of a row) uint8."""
    raw: np.ndarray
    format: Format

    def values(self) -> np.ndarray:
        """(..., rows, columns) float32."""
        columns = self.raw.shape[-1] // self.format.size * self.format.block
        return unpack(self.raw.reshape(-1), self.format, (*self.raw.shape[:-1], columns))


class Loader:
    """Reads tensors of a file onto the device, in the engine's row order. `fused` stacks what reads the same input;
    `packed` keeps the file's blocks."""

    def __init__(self, file: GGUF, config: ModelConfig, fused: bool, packed: bool, device: str | None):
        self.file, self.config, self.fused, self.packed, self.device = file, config, fused, packed, device

    def rows(self, name: str) -> Rows:
        info = self.file.tensors[name]
        return Rows(self.file.raw(name).reshape(*info.shape[:-1], -1), info.format)

    def floats(self, *parts: Rows) -> Tensor:
        """One float32 tensor: the parts' values stacked along the rows."""
        values = [part.values() for part in parts]
        stacked = values[0] if len(values) == 1 else np.concatenate(values, axis=-2)
        return Tensor(np.ascontiguousarray(stacked), device=self.device).realize()

    def vector(self, name: str) -> Tensor:
        """What is never packed: one-dimensional tensors, whatever their format (llama.cpp #19606), and the taps of the
        convolution."""
        return Tensor(self.file.values(name), device=self.device).realize()

    def matrix(self, *parts: Rows) -> Weight:
        """One weight: the parts stacked along the rows. Packed, they are of one format."""
        if not self.packed:
            return self.floats(*parts)
        if parts[0].raw.shape[-1] // parts[0].format.size * parts[0].format.block % OCTET:
            raise ValueError(f"recipe: weights=packed needs rows of a multiple of {OCTET} values, and this model has "
                             "others: use weights=float")
        raw = parts[0].raw if len(parts) == 1 else np.concatenate([part.raw for part in parts], axis=-2)
        shape = *raw.shape[:-1], raw.shape[-1] // parts[0].format.size * parts[0].format.block
        raw = np.require(raw, requirements=["C", "W"])      # CUDA copies from writable memory only: not from the map
        bytes = Tensor(raw.reshape(-1, raw.shape[-1]), device=self.device)
        return Packed.from_bytes(bytes, parts[0].format.name, shape)

    def named(self, name: str) -> Weight:
        return self.matrix(self.rows(name))

    def inputs(self, *parts: Rows) -> tuple[Weight, ...]:
        """Weights that read the same input. Fused, they are one; packed, one for each run of parts of one format."""
        if not self.fused:
            return tuple(self.matrix(part) for part in parts)
        runs = [list(run) for _, run in groupby(parts, lambda part: part.format.name if self.packed else "")]
        return tuple(self.matrix(*run) for run in runs)

    def pair(self, first: str, second: str) -> tuple[Weight, ...]:
        """The two halves of a gated network: side by side where they are packed."""
        parts = self.rows(first), self.rows(second)
        return tuple(self.matrix(part) for part in parts) if self.packed else self.inputs(*parts)

    def delta_net(self, at: str) -> DeltaNetWeights:
        c = self.config
        if at + "ssm_in.weight" in self.file.tensors:
            whole = self.rows(at + "ssm_in.weight")
            qkv, z = (Rows(part, whole.format) for part in split_fused_input(whole.raw, c))
        else:
            qkv, z = self.rows(at + "attn_qkv.weight"), self.rows(at + "attn_gate.weight")
        whole, shared = self.rows(at + "ssm_ba.weight"), c.v_heads // c.k_heads
        ba = whole.raw.reshape(c.k_heads, 2, shared, -1)                                # per k-head [b b | a a]
        b, a = (Rows(ba[:, i].reshape(c.v_heads, -1), whole.format) for i in (0, 1))
        return DeltaNetWeights(self.inputs(qkv, z, b, a), self.vector(at + "ssm_conv1d.weight"),
                               self.vector(at + "ssm_dt.bias"), self.vector(at + "ssm_a"),
                               self.vector(at + "ssm_norm.weight"), self.named(at + "ssm_out.weight"))

    def attention(self, at: str) -> AttentionWeights:
        rows = (self.rows(f"{at}attn_{part}.weight") for part in "qkv")
        return AttentionWeights(self.inputs(*rows), self.vector(at + "attn_q_norm.weight"),
                                self.vector(at + "attn_k_norm.weight"), self.named(at + "attn_output.weight"))

    def experts(self, at: str) -> ExpertWeights:
        gate_up = self.pair(at + "ffn_gate_exps.weight", at + "ffn_up_exps.weight")
        shared = self.pair(at + "ffn_gate_shexp.weight", at + "ffn_up_shexp.weight")
        return ExpertWeights(self.named(at + "ffn_gate_inp.weight"), gate_up, self.named(at + "ffn_down_exps.weight"),
                             self.vector(at + "ffn_gate_inp_shexp.weight").reshape(-1), shared,
                             self.named(at + "ffn_down_shexp.weight"))

    def layer(self, index: int) -> LayerWeights:
        at = f"blk.{index}."
        recurrent = index < self.config.layers and self.config.recurrent[index]
        mixer = self.delta_net(at) if recurrent else self.attention(at)
        return LayerWeights(self.vector(at + "attn_norm.weight"), mixer,
                            self.vector(at + "post_attention_norm.weight"), self.experts(at))

    def mtp(self, embed: Weight, head: Weight) -> MTPWeights:
        index = self.config.layers
        at = f"blk.{index}.nextn."

        def own(name: str, shared: Weight) -> Weight:
            return self.named(at + name) if at + name in self.file.tensors else shared
        return MTPWeights(self.vector(at + "enorm.weight"), self.vector(at + "hnorm.weight"),
                          self.named(at + "eh_proj.weight"), self.layer(index),
                          self.vector(at + "shared_head_norm.weight"),
                          own("embed_tokens.weight", embed), own("shared_head_head.weight", head))


def split_fused_input(rows: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Older files hold one `ssm_in`, rows grouped per k-head as [q | k | v v | z z]: [q|k|v] and z.

    rows (rows, anything)."""
    c, dim, shared = config, config.state_dim, config.v_heads // config.k_heads
    grouped = rows.reshape(c.k_heads, (2 + 2 * shared) * dim, -1)
    q, k, v, z = (part.reshape(-1, rows.shape[-1])
                  for part in np.split(grouped, [dim, 2 * dim, (2 + shared) * dim], axis=1))
    return np.concatenate([q, k, v]), z


def load_weights(file: GGUF, config: ModelConfig, fused: bool = False, packed: bool = False,
                 device: str | None = None, *,
                 progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> ModelWeights:
    """All weights of a checked file on the device, as float32 or packed as they are; `progress` wraps the loop over
    layers."""
    loader = Loader(file, config, fused, packed, device)
    embed = loader.named("token_embd.weight")
    head = loader.named("output.weight") if "output.weight" in file.tensors else embed
    layers = tuple(loader.layer(index) for index in progress(range(config.layers)))
    mtp = loader.mtp(embed, head) if config.mtp_blocks else None
    return ModelWeights(embed, layers, loader.vector("output_norm.weight"), head, mtp)
