"""Bits per byte and acceptance of drafts on held-out text, while training."""
import math

import torch
import torch.nn.functional as F

from training.device import DEVICE
from training.layers import linear
from training.model import Model


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
