"""Weights: from a checked GGUF file to tensors on the device, one record per part of the model.

Rows are put into the order in which the engine reads them here, once, so that no step has to un-permute anything
(llama.cpp #18683 moved the same work from its graph into the conversion).
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields

import numpy as np
from tinygrad import Tensor

from minillama.config import ModelConfig
from minillama.gguf import GGUF


@dataclass(frozen=True)
class DeltaNetWeights:
    """A Gated DeltaNet mixer. `inputs`: rows of [q|k|v], z, b, a, as four weights or stacked as one."""
    inputs: tuple[Tensor, ...]      # (conv_channels, hidden), (value_width, hidden), (v_heads, hidden) twice
    conv: Tensor                    # (conv_channels, conv_width)
    dt_bias: Tensor                 # (v_heads,)
    a: Tensor                       # (v_heads,): -exp(A_log)
    norm: Tensor                    # (state_dim,)
    out: Tensor                     # (hidden, value_width)


@dataclass(frozen=True)
class AttentionWeights:
    """A gated attention mixer. `inputs`: rows of q (per head [query|gate]), k, v, as three weights or one."""
    inputs: tuple[Tensor, ...]      # (2 * heads * head_dim, hidden), (kv_heads * head_dim, hidden) twice
    q_norm: Tensor                  # (head_dim,)
    k_norm: Tensor                  # (head_dim,)
    out: Tensor                     # (hidden, heads * head_dim)


@dataclass(frozen=True)
class ExpertWeights:
    """A router, its experts and the shared expert. `gate_up` and `shared_inputs`: two weights each, or one."""
    router: Tensor                  # (experts, hidden)
    gate_up: tuple[Tensor, ...]     # (experts, expert_width, hidden) twice, or (experts, 2 * expert_width, hidden)
    down: Tensor                    # (experts, hidden, expert_width)
    shared_gate: Tensor             # (hidden,)
    shared_inputs: tuple[Tensor, ...]   # (shared_width, hidden) twice, or (2 * shared_width, hidden)
    shared_down: Tensor             # (hidden, shared_width)

    def pair(self) -> tuple[Tensor, ...]:
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
    project: Tensor                 # (hidden, 2 * hidden): reads [embedding | hidden state]
    layer: LayerWeights
    out_norm: Tensor                # (hidden,)
    embed: Tensor                   # (vocab, hidden): the model's own unless the file has one for the block
    head: Tensor                    # (vocab, hidden): likewise


@dataclass(frozen=True)
class ModelWeights:
    """The whole model. `mtp` is None where the file has no such block."""
    embed: Tensor                   # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    out_norm: Tensor                # (hidden,)
    head: Tensor                    # (vocab, hidden)
    mtp: MTPWeights | None


class Loader:
    """Reads tensors of a file onto the device, in the engine's row order; `fused` stacks what reads the same input."""

    def __init__(self, file: GGUF, config: ModelConfig, fused: bool, device: str | None):
        self.file, self.config, self.fused, self.device = file, config, fused, device

    def tensor(self, *values: np.ndarray) -> Tensor:
        """One tensor on the device: the values stacked along the rows, float32."""
        stacked = values[0] if len(values) == 1 else np.concatenate(values, axis=-2)
        return Tensor(np.ascontiguousarray(stacked, dtype=np.float32), device=self.device).realize()

    def named(self, name: str) -> Tensor:
        return self.tensor(self.file.values(name))

    def inputs(self, *values: np.ndarray) -> tuple[Tensor, ...]:
        return (self.tensor(*values),) if self.fused else tuple(self.tensor(value) for value in values)

    def delta_net(self, at: str) -> DeltaNetWeights:
        c, values = self.config, self.file.values
        if at + "ssm_in.weight" in self.file.tensors:
            qkv, z = split_fused_input(values(at + "ssm_in.weight"), c)
        else:
            qkv, z = values(at + "attn_qkv.weight"), values(at + "attn_gate.weight")
        shared = c.v_heads // c.k_heads
        ba = values(at + "ssm_ba.weight").reshape(c.k_heads, 2, shared, c.hidden)       # per k-head [b b | a a]
        b, a = (ba[:, i].reshape(c.v_heads, c.hidden) for i in (0, 1))
        return DeltaNetWeights(self.inputs(qkv, z, b, a), self.named(at + "ssm_conv1d.weight"),
                               self.named(at + "ssm_dt.bias"), self.named(at + "ssm_a"),
                               self.named(at + "ssm_norm.weight"), self.named(at + "ssm_out.weight"))

    def attention(self, at: str) -> AttentionWeights:
        rows = (self.file.values(f"{at}attn_{part}.weight") for part in "qkv")
        return AttentionWeights(self.inputs(*rows), self.named(at + "attn_q_norm.weight"),
                                self.named(at + "attn_k_norm.weight"), self.named(at + "attn_output.weight"))

    def experts(self, at: str) -> ExpertWeights:
        gate_up = self.inputs(*(self.file.values(f"{at}ffn_{part}_exps.weight") for part in ("gate", "up")))
        shared = self.inputs(*(self.file.values(f"{at}ffn_{part}_shexp.weight") for part in ("gate", "up")))
        return ExpertWeights(self.named(at + "ffn_gate_inp.weight"), gate_up, self.named(at + "ffn_down_exps.weight"),
                             self.tensor(self.file.values(at + "ffn_gate_inp_shexp.weight").reshape(-1)), shared,
                             self.named(at + "ffn_down_shexp.weight"))

    def layer(self, index: int) -> LayerWeights:
        at = f"blk.{index}."
        recurrent = index < self.config.layers and self.config.recurrent[index]
        return LayerWeights(self.named(at + "attn_norm.weight"), (self.delta_net if recurrent else self.attention)(at),
                            self.named(at + "post_attention_norm.weight"), self.experts(at))

    def mtp(self, embed: Tensor, head: Tensor) -> MTPWeights:
        index = self.config.layers
        at = f"blk.{index}.nextn."

        def own(name: str, shared: Tensor) -> Tensor:
            return self.named(at + name) if at + name in self.file.tensors else shared
        return MTPWeights(self.named(at + "enorm.weight"), self.named(at + "hnorm.weight"),
                          self.named(at + "eh_proj.weight"), self.layer(index),
                          self.named(at + "shared_head_norm.weight"),
                          own("embed_tokens.weight", embed), own("shared_head_head.weight", head))


def split_fused_input(rows: np.ndarray, config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """Older files hold one `ssm_in`, rows grouped per k-head as [q | k | v v | z z]: returns [q|k|v] and z."""
    c, dim, shared = config, config.state_dim, config.v_heads // config.k_heads
    grouped = rows.reshape(c.k_heads, (2 + 2 * shared) * dim, -1)
    q, k, v, z = (part.reshape(-1, rows.shape[-1])
                  for part in np.split(grouped, [dim, 2 * dim, (2 + shared) * dim], axis=1))
    return np.concatenate([q, k, v]), z


def overwrite(old: object, new: object) -> None:
    """Put the values of one record of weights into the tensors of another of the same shapes: captured steps go on."""
    if isinstance(old, Tensor):
        old.assign(new).realize()
    elif isinstance(old, tuple):
        for mine, theirs in zip(old, new, strict=True):
            overwrite(mine, theirs)
    elif old is not None:
        for field in fields(old):
            overwrite(getattr(old, field.name), getattr(new, field.name))


def load_weights(file: GGUF, config: ModelConfig, fused: bool = False, device: str | None = None,
                 progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> ModelWeights:
    """All weights of a checked file as float32 on the device; `progress` wraps the loop over layers."""
    loader = Loader(file, config, fused, device)
    embed = loader.named("token_embd.weight")
    head = loader.named("output.weight") if "output.weight" in file.tensors else embed
    layers = tuple(loader.layer(index) for index in progress(range(config.layers)))
    mtp = loader.mtp(embed, head) if config.mtp_blocks else None
    return ModelWeights(embed, layers, loader.named("output_norm.weight"), head, mtp)
