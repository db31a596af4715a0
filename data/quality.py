"""How well a model file predicts held-out Python, and how many of its drafts it would accept itself.

The text is one stream of tokens, each document followed by <|endoftext|>, as in training. A window of 1,024 tokens
starts from an empty state and its later half counts; windows that overlap by half cover the stream. The layers are the
engine's own functions in the form that training uses (`minillama.train.train_layer`): no cache, one graph a window.
"""
import lzma
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tinygrad import Tensor, TinyJit

from minillama import delta_net
from minillama.attention import keys_and_values
from minillama.config import ModelConfig, check_tensors
from minillama.experts import experts_layer
from minillama.gguf import GGUF
from minillama.layers import linear, rms_norm, rope_table, swiglu
from minillama.mtp import mtp_block, mtp_input
from minillama.tokenizer import Tokenizer
from minillama.train import train_layer
from minillama.weights import ExpertWeights, ModelWeights, MTPWeights, load_weights

WINDOW = 1024
AHEAD = 2           # tokens past the window: the last one's next, and the one that its draft is about


def side_by_side(x: Tensor, w: ExpertWeights, ids: Tensor, probs: Tensor) -> Tensor:
    """`experts.dense` with the down weights laid out for a CPU: all experts as one wide network, in plain products."""
    experts, hidden, width = w.down.shape
    share = (ids.unsqueeze(-1) == Tensor.arange(experts)).where(probs.unsqueeze(-1), 0).sum(axis=1)
    gate, up = (linear(x, weight.reshape(experts * width, hidden).contiguous()).contiguous() for weight in w.pair())
    y = (swiglu(gate, up).reshape(-1, experts, width) * share.unsqueeze(-1)).reshape(-1, experts * width).contiguous()
    return linear(y, w.down.permute(1, 0, 2).reshape(hidden, experts * width).contiguous())


def second_draft(ids: Tensor, first: Tensor, hidden: Tensor, w: MTPWeights, c: ModelConfig, table: Tensor) -> Tensor:
    """The block on its own output, one position on: row p is drafted from what the block said at p - 1.

    It sees its first pass's keys before p and its own at p, as in drafting, where a pass writes one row of the cache.
    ids (tokens, 1) one ahead, first and hidden (tokens, 1, hidden): the block's output and what it read.
    """
    tokens = ids.shape[0]
    _, _, keys, values = keys_and_values(rms_norm(mtp_input(ids, hidden, w, c), w.layer.norm, c.norm_eps),
                                         w.layer.mixer, c, table)           # (tokens, kv_heads, dim) each
    x = mtp_input(ids, Tensor.zeros(1, 1, c.hidden).cat(first[:-1]), w, c)
    q, gate, k, v = keys_and_values(rms_norm(x, w.layer.norm, c.norm_eps), w.layer.mixer, c, table)
    q = q.reshape(tokens, c.kv_heads, -1, c.head_dim) * c.head_dim ** -0.5  # (tokens, kv_heads, group, dim)
    past = q.permute(1, 2, 0, 3) @ keys.permute(1, 2, 0).unsqueeze(1)       # (kv_heads, group, tokens, tokens)
    before = Tensor.arange(tokens).reshape(1, -1) < Tensor.arange(tokens).reshape(-1, 1)
    own = (q * k.unsqueeze(2)).sum(-1).permute(1, 2, 0).unsqueeze(-1)       # (kv_heads, group, tokens, 1)
    share = before.where(past, float("-inf")).cat(own, dim=-1).softmax(-1).contiguous()
    out = share[..., :-1] @ values.permute(1, 0, 2).unsqueeze(1).contiguous()
    out = out + share[..., -1:] * v.permute(1, 0, 2).unsqueeze(1)
    out = out.permute(2, 0, 1, 3).reshape(gate.shape) * gate.sigmoid()      # (tokens, heads, dim)
    x = x + linear(out.reshape(tokens, 1, -1), w.layer.mixer.out)
    y = experts_layer(rms_norm(x, w.layer.post_norm, c.norm_eps), w.layer.experts, c, side_by_side)[0]
    return rms_norm(x + y, w.out_norm, c.norm_eps)


def read_window(ids: Tensor, w: ModelWeights, config: ModelConfig, table: Tensor) -> tuple[Tensor, Tensor]:
    """ids (tokens + AHEAD,): at each of `tokens` positions -ln p of the next id (tokens,), and the greedy choices of
    the trunk, of the first and of the second draft (3, tokens)."""
    ids = ids.unsqueeze(1)                                                  # (tokens, a batch of one)
    x = w.embed[ids[:-AHEAD]]
    for layer in w.layers:
        x = train_layer(x, layer, config, table, delta_net.chunked, side_by_side)[0]
    hidden = rms_norm(x, w.out_norm, config.norm_eps).contiguous()
    first = mtp_block(ids[1:-1], hidden, w.mtp, config, side_by_side, table)[0].contiguous()
    second = second_draft(ids[1:-1], first, hidden, w.mtp, config, table).contiguous()
    logits = linear(hidden, w.head).squeeze(1).contiguous()                 # (tokens, vocab)
    nats = logits.logsumexp(-1) - logits.gather(-1, ids[1:-1]).squeeze(-1)
    drafts = [linear(h.squeeze(1), w.mtp.head).contiguous().argmax(-1) for h in (first, second)]
    return nats, Tensor.stack(logits.argmax(-1), *drafts)


class Reader:
    """A model file, ready to read windows."""

    def __init__(self, path: str | Path, window: int = WINDOW):
        file = GGUF(path)
        config = ModelConfig.from_gguf(file)
        check_tensors(file, config)
        weights = load_weights(file, config, True, None, iter)
        table = rope_table(window, config.rope_dim, config.rope_base)
        self.tokenizer, self.config, self.window = Tokenizer.from_gguf(file), config, window

        def step(ids: Tensor) -> tuple[Tensor, Tensor]:
            nats, said = read_window(ids, weights, config, table)
            return nats.realize(), said.realize()
        self.step = TinyJit(step)
        self.step.cnt = 1       # capture at the first call

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
