"""How well a model file predicts held-out Python, and how many of its drafts it would accept itself.

The text is one stream of tokens, each document followed by <|endoftext|>, as in training. A window of 1,024 tokens
starts from an empty state and its later half counts; windows that overlap by half cover the stream. A window is one
graph of the engine's own functions, without a cache: attention alone is written out here, since the second draft sees
keys of two kinds.
"""
import lzma
import math
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit

from minillama.attention import keys_and_values
from minillama.config import ModelConfig, check_tensors
from minillama.delta_net import chunked, delta_net
from minillama.experts import route
from minillama.gguf import GGUF
from minillama.layers import linear, project, rms_norm, rope_table, swiglu
from minillama.mtp import mtp_input
from minillama.tokenizer import Tokenizer
from minillama.weights import (
    AttentionWeights,
    DeltaNetWeights,
    ExpertWeights,
    LayerWeights,
    ModelWeights,
    load_weights,
)

WINDOW = 1024
AHEAD = 2           # tokens past the window: the last one's next, and the one that its draft is about


def side_by_side(x: Tensor, w: ExpertWeights, ids: Tensor, probs: Tensor) -> Tensor:
    """`experts.dense`, cut into kernels that a CPU runs well: all experts as one wide network in plain products."""
    experts, hidden, width = w.down.shape
    share = (ids.unsqueeze(-1) == Tensor.arange(experts)).where(probs.unsqueeze(-1), 0).sum(axis=1)
    gate, up = (linear(x, weight.reshape(experts * width, hidden).contiguous()).contiguous() for weight in w.pair())
    y = (swiglu(gate, up).reshape(-1, experts, width) * share.unsqueeze(-1)).reshape(-1, experts * width).contiguous()
    return linear(y, w.down.permute(1, 0, 2).reshape(hidden, experts * width).contiguous()).contiguous()


def attention(x: Tensor, w: AttentionWeights, c: ModelConfig, table: Tensor,
              seen: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Gated attention over a whole window; x (tokens, hidden). Returns the same shape, and the keys and values.

    `seen`: keys and values (tokens, kv_heads, dim) that stand for x's own at every position but the token's own.
    """
    tokens = x.shape[0]
    q, gate, k, v = keys_and_values(x, w, c, table)
    keys, values = (k, v) if seen is None else seen
    flat = c.kv_heads, -1, c.head_dim
    q = q.reshape(tokens, *flat) * c.head_dim ** -0.5
    q = q.permute(1, 2, 0, 3).contiguous()                                  # (kv_heads, group, tokens, dim)
    past = (q.reshape(*flat) @ keys.permute(1, 2, 0)).contiguous().reshape(*q.shape[:3], tokens)
    own = (q * k.permute(1, 0, 2).unsqueeze(1)).sum(-1, keepdim=True)       # (kv_heads, group, tokens, 1)
    before = Tensor.arange(tokens).reshape(1, -1) < Tensor.arange(tokens).reshape(-1, 1)
    largest = before.where(past, float("-inf")).max(-1, keepdim=True).maximum(own).contiguous()
    share, own = before.where((past - largest).exp(), 0).contiguous(), (own - largest).exp().contiguous()
    out = (share.reshape(c.kv_heads, -1, tokens) @ values.permute(1, 0, 2).contiguous()).contiguous().reshape(q.shape)
    out = (out + own * v.permute(1, 0, 2).unsqueeze(1)) / (share.sum(-1, keepdim=True) + own)
    out = (out.permute(2, 0, 1, 3).reshape(gate.shape) * gate.sigmoid()).contiguous()       # (tokens, heads, dim)
    return linear(out.reshape(tokens, -1), w.out).contiguous(), (k, v)


def feed_forward(x: Tensor, w: LayerWeights, c: ModelConfig) -> Tensor:
    """What follows a mixer: x + experts(post_norm(x)), in kernels that a CPU runs well."""
    rows, e = rms_norm(x, w.post_norm, c.norm_eps).contiguous(), w.experts
    ids, probs, _ = route(rows, e.router, c.experts_used)
    gate, up = project(rows, e.shared_inputs, (c.shared_width, c.shared_width))
    shared = linear(swiglu(gate, up).contiguous(), e.shared_down).contiguous()
    lever = (rows * e.shared_gate).sum(axis=-1, keepdim=True).sigmoid()
    return (x + side_by_side(rows, e, ids, probs) + shared * lever).contiguous()


def trunk_layer(x: Tensor, w: LayerWeights, c: ModelConfig, table: Tensor) -> Tensor:
    """One layer over a window, x (tokens, hidden), its state empty at first."""
    normed = rms_norm(x, w.norm, c.norm_eps)
    if isinstance(w.mixer, DeltaNetWeights):
        window, memory = Tensor.zeros(c.conv_width - 1, c.conv_channels), Tensor.zeros(c.v_heads, *[c.state_dim] * 2)
        mixed = delta_net(normed, w.mixer, c, chunked, window, memory)[0]
    else:
        mixed = attention(normed, w.mixer, c, table)[0]
    return feed_forward((x + mixed).contiguous(), w, c)


def drafts(ids: Tensor, hidden: Tensor, w: ModelWeights, c: ModelConfig, table: Tensor) -> tuple[Tensor, Tensor]:
    """The MTP block's normed output (tokens, hidden) for the first draft and for the second.

    ids (tokens,) are one position ahead of hidden. The second pass reads, at p, what the first said at p - 1; it sees
    the first pass's keys before p and its own at p, as in drafting, where each pass writes one row of the cache.
    """
    layer, eps = w.mtp.layer, c.norm_eps

    def block(read: Tensor, seen: tuple | None) -> tuple[Tensor, tuple]:
        x = mtp_input(ids, read, w.mtp, c)
        mixed, own = attention(rms_norm(x, layer.norm, eps), layer.mixer, c, table, seen)
        return rms_norm(feed_forward((x + mixed).contiguous(), layer, c), w.mtp.out_norm, eps).contiguous(), own
    first, seen = block(hidden, None)
    return first, block(Tensor.zeros(1, c.hidden).cat(first[:-1]).contiguous(), seen)[0]


def read_window(ids: Tensor, w: ModelWeights, c: ModelConfig, table: Tensor) -> tuple[Tensor, Tensor]:
    """ids (tokens + AHEAD,): at each of `tokens` positions -ln p of the next id (tokens,), and the greedy choices of
    the trunk, of the first and of the second draft (3, tokens)."""
    x = w.embed[ids[:-AHEAD]].contiguous()
    for layer in w.layers:
        x = trunk_layer(x, layer, c, table)
    hidden = rms_norm(x, w.out_norm, c.norm_eps).contiguous()
    logits = linear(hidden, w.head).contiguous()                            # (tokens, vocab)
    nats = logits.logsumexp(-1) - logits.gather(-1, ids[1:-1].unsqueeze(-1)).squeeze(-1)
    said = [linear(out, w.mtp.head).contiguous().argmax(-1) for out in drafts(ids[1:-1], hidden, w, c, table)]
    return nats, Tensor.stack(logits.argmax(-1), *said)


def leaves(record) -> list[Tensor]:
    """All tensors of nested records, in order."""
    if isinstance(record, Tensor):
        return [record]
    parts = [getattr(record, f.name) for f in fields(record)] if is_dataclass(record) else record or ()
    return [tensor for part in parts for tensor in leaves(part)]


class Reader:
    """Reads windows of a model; `load` puts other weights of the same shapes in their place, the graph stays."""

    def __init__(self, path: str | Path, window: int = WINDOW):
        file = GGUF(path)
        self.config, self.tokenizer, self.window = ModelConfig.from_gguf(file), Tokenizer.from_gguf(file), window
        self.weights = self._weights(path)
        table = rope_table(window, self.config.rope_dim, self.config.rope_base)

        def step(ids: Tensor) -> tuple[Tensor, Tensor]:
            nats, said = read_window(ids, self.weights, self.config, table)
            return nats.realize(), said.realize()
        self.step = TinyJit(step)
        self.step.cnt = 1       # capture at the first call

    def _weights(self, path: str | Path) -> ModelWeights:
        file = GGUF(path)
        check_tensors(file, self.config)
        return load_weights(file, self.config, fused=True)

    def load(self, path: str | Path) -> None:
        for kept, new in zip(leaves(self.weights), leaves(self._weights(path)), strict=True):
            kept.assign(new.to(kept.device)).realize()

    def read(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `read_window`, in numpy."""
        nats, said = self.step(Tensor(ids.astype(np.int32)).realize())
        return nats.numpy().astype(np.float64), said.numpy()


# ---- held-out text ------------------------------------------------------------------------------------------------


def documents(corpus: Path) -> list[str]:
    return lzma.decompress((corpus / "heldout.txt.xz").read_bytes()).decode().split("\x00")


def stream(texts: list[str], tokenizer: Tokenizer) -> np.ndarray:
    """All documents as token ids, each followed by <|endoftext|>."""
    return np.concatenate([np.array([*tokenizer.encode(text, special=False), tokenizer.eos]) for text in texts])


def window_starts(tokens: int, every: int, window: int = WINDOW) -> list[int]:
    """Where windows start that overlap by half; of these, one in `every`."""
    return list(range(0, tokens - window - AHEAD, window // 2))[::every]


def counted(ids: np.ndarray, starts: list[int], window: int = WINDOW) -> list[np.ndarray]:
    """The ids that windows are judged by: what follows each position of their later half."""
    return [ids[start + window // 2 + 1:start + window + 1] for start in starts]


# ---- figures ------------------------------------------------------------------------------------------------------


def acceptance(said: np.ndarray, ids: np.ndarray, half: int) -> np.ndarray:
    """Counts over the later half of a window: [first drafts, accepted, second drafts, accepted, second drafts whose
    first is also what the text has, accepted].

    said (3, tokens) as of `read_window`. At p the first draft guesses what the trunk will say at p + 1 and the second
    what it will say at p + 2; the second is made, and judged, where the first was accepted.
    """
    trunk, first, second = said
    hit_first = (first[:-2] == trunk[1:-1])[half:]
    hit_second = (second[1:-1] == trunk[2:])[half:]                         # made at p, stored at p + 1
    in_text = hit_first & (trunk[1:-1] == ids[2:len(trunk)])[half:]
    return np.array([hit_first.size, hit_first.sum(), hit_first.sum(), (hit_first & hit_second).sum(),
                     in_text.sum(), (in_text & hit_second).sum()])


def judge(reader: Reader, ids: np.ndarray, starts: list[int], progress: Callable[[int, int], None]) -> dict:
    """The figures of one model file over windows of the stream."""
    half, end = reader.window // 2, reader.tokenizer.eos
    sizes = np.array([len(reader.tokenizer.token_bytes(i)) for i in range(reader.tokenizer.vocab_size)])
    sizes[end] = 0                                                          # no text: neither its bytes nor its bits
    bits, texts, drafts = [], [], np.zeros(6)
    for done, start in enumerate(starts):
        progress(done, len(starts))
        part = ids[start:start + reader.window + AHEAD]
        nats, said = reader.read(part)
        following = part[half + 1:reader.window + 1]
        bits.append((nats[half:] * (following != end)).sum() / math.log(2))
        texts.append([sizes[following].sum(), (following != end).sum()])
        drafts += acceptance(said, part, half)
    progress(len(starts), len(starts))
    return summary(np.array(bits), np.array(texts), drafts)


def summary(bits: np.ndarray, texts: np.ndarray, drafts: np.ndarray) -> dict[str, float]:
    """bits (windows,), texts (windows, 2): bytes and tokens. The standard error is that of a ratio over windows."""
    size, tokens = texts.sum(axis=0)
    ratio = bits.sum() / size
    error = math.sqrt(((bits - ratio * texts[:, 0]) ** 2).sum()) / size
    return {"bits_per_byte": float(ratio), "standard_error": float(error), "tokens": int(tokens), "bytes": int(size),
            "nats_per_token": float(bits.sum() * math.log(2) / tokens), "first_draft": drafts[1] / drafts[0],
            "second_given_first": drafts[3] / max(drafts[2], 1),
            "second_given_first_in_text": drafts[5] / max(drafts[4], 1)}
