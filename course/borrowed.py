"""What chapter 03 borrows from later ones, in plain numpy: the layers before an attention layer, the experts after it.

Written as the formulas stand, in float64, token by token; nothing here runs on a device, so that nothing need be
compiled for one picture. `delta_net.py` and `experts.py` are the engine's forms, chapters 04 and 06 derive them.
"""
from collections.abc import Sequence

import numpy as np

from minillama.config import ModelConfig
from minillama.gguf import GGUF


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _silu(x: np.ndarray) -> np.ndarray:
    return x * _sigmoid(x)


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x ** 2).mean(axis=-1, keepdims=True) + eps) * weight


def _length_one(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x ** 2).sum(axis=-1, keepdims=True) + 1e-6)


class Layer:
    """The tensors of one layer of a file, float64, by the last part of their names."""

    def __init__(self, file: GGUF, config: ModelConfig, index: int):
        self.file, self.config, self.index = file, config, index

    def __call__(self, name: str) -> np.ndarray:
        return self.file.values(f"blk.{self.index}.{name}").astype(np.float64)


def delta_net(x: np.ndarray, w: Layer) -> np.ndarray:
    """A Gated DeltaNet mixer on normed rows x (tokens, hidden) from an empty state; returns (tokens, hidden)."""
    c, tokens = w.config, len(x)
    channels = np.pad(x @ w("attn_qkv.weight").T, ((c.conv_width - 1, 0), (0, 0)))
    taps = w("ssm_conv1d.weight")                                           # (channels, width)
    qkv = _silu(sum(channels[i:i + tokens] * taps[:, i] for i in range(c.conv_width)))
    q, k, v = (part.reshape(tokens, -1, c.state_dim) for part in np.split(qkv, [c.key_width, 2 * c.key_width], axis=1))
    shared = c.v_heads // c.k_heads
    q, k = (np.repeat(_length_one(part), shared, axis=1) for part in (q, k))
    b, a = np.moveaxis((x @ w("ssm_ba.weight").T).reshape(tokens, c.k_heads, 2, shared), 2, 0).reshape(2, tokens, -1)
    decay = np.exp(np.logaddexp(0, a + w("ssm_dt.bias")) * w("ssm_a"))      # (tokens, v_heads)
    memory, outs = np.zeros((c.v_heads, c.state_dim, c.state_dim)), []
    for t in range(tokens):
        memory *= decay[t, :, None, None]
        delta = (v[t] - np.einsum("hij,hi->hj", memory, k[t])) * _sigmoid(b[t])[:, None]
        memory += k[t][:, :, None] * delta[:, None]
        outs.append(np.einsum("hij,hi->hj", memory, q[t]) * c.state_dim ** -0.5)
    gate = _silu(x @ w("attn_gate.weight").T).reshape(tokens, c.v_heads, -1)
    out = _rms(np.stack(outs), w("ssm_norm.weight"), c.norm_eps) * gate
    return out.reshape(tokens, -1) @ w("ssm_out.weight").T


def experts(x: np.ndarray, w: Layer) -> np.ndarray:
    """A mixture of experts and its shared expert on normed rows x (tokens, hidden); returns (tokens, hidden)."""
    def network(rows: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
        return _silu(rows @ gate.T) * (rows @ up.T) @ down.T
    scores = np.exp(x @ w("ffn_gate_inp.weight").T)                         # (tokens, experts)
    chosen = np.argsort(-scores, axis=1)[:, :w.config.experts_used]
    every = [w(f"ffn_{part}_exps.weight") for part in ("gate", "up", "down")]
    y = network(x, *(w(f"ffn_{part}_shexp.weight") for part in ("gate", "up", "down")))
    y *= _sigmoid(x @ w("ffn_gate_inp_shexp.weight").reshape(-1, 1))
    for t, ids in enumerate(chosen):
        share = scores[t, ids] / scores[t, ids].sum()
        y[t] += sum(p * network(x[t], *(part[i] for part in every)) for p, i in zip(share, ids, strict=True))
    return y


def second_half(x: np.ndarray, file: GGUF, config: ModelConfig, index: int) -> np.ndarray:
    """The second half of layer `index`: x (tokens, hidden) and what its experts add."""
    w = Layer(file, config, index)
    return x + experts(_rms(x, w("post_attention_norm.weight"), config.norm_eps), w)


def rows_before(ids: Sequence[int], file: GGUF, config: ModelConfig) -> tuple[np.ndarray, int]:
    """What goes into the first attention layer when the model reads ids: (tokens, hidden), and that layer's index."""
    x = file.values("token_embd.weight")[list(ids)].astype(np.float64)
    first = config.recurrent.index(False)
    for index in range(first):
        w = Layer(file, config, index)
        x = second_half(x + delta_net(_rms(x, w("attn_norm.weight"), config.norm_eps), w), file, config, index)
    return x, first
