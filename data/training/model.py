"""Heads, losses, the two drafts of the MTP block, and the model that puts all pieces together."""
import torch
import torch.nn.functional as F

from training.delta import delta_layer
from training.device import DEVICE, HALF
from training.layers import (
    attention_layer,
    dense_experts,
    embedding,
    experts_layer,
    gated_output,
    grouped_experts,
    linear,
    projections,
    rms,
    rope_table,
)
from training.weights import HIDDEN, LAYERS, is_recurrent, of_block


def trunk_loss(x, norm, head, targets):
    """Mean cross-entropy, the normed hidden states, and the logits without gradient."""
    hidden = rms(x, norm)
    logits = linear(hidden, head)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), hidden, logits.detach()


def draft_loss(hidden, head, targets, trunk, soft: float):
    """Cross-entropy of the block's guesses, `soft` of it against the trunk's distribution, which is one token ahead.

    hidden (batch, tokens, hidden); targets (batch, tokens), -1 where none; trunk logits (batch, tokens, vocab).
    """
    logits = linear(hidden, head).float()
    log_norm = logits.logsumexp(-1)
    text = log_norm - logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    ahead = torch.cat([trunk[:, 1:], trunk[:, -1:]], dim=1).float().softmax(-1)
    agree = log_norm - (ahead * logits).sum(-1)
    known = (targets >= 0).float()
    paired = torch.cat([known[:, :-1], torch.zeros_like(known[:, :1])], dim=1)
    return (1 - soft) * (text * known).sum() / known.sum() + soft * (agree * paired).sum() / paired.sum()


def draft_input(embedded, hidden, w):
    both = torch.cat([rms(embedded, w["nextn.enorm"]), rms(hidden, w["nextn.hnorm"])], dim=-1)
    return linear(both, w["nextn.eh_proj"]).float()


def first_draft(embedded, hidden, w, table, mask, routed):
    """The block on true hidden states: its normed output, its keys and values, the balancing loss."""
    x = draft_input(embedded, hidden, w)
    q, k, v, gate = projections(rms(x, w["attn_norm"]), w, table)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    x = x + gated_output(out, gate, w) * mask[0]
    y, balance = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return rms(x + y * mask[1], w["nextn.shared_head_norm"]), k, v, balance


def second_draft(embedded, output, keys, values, w, table, seen, mask, routed):
    """The block on its own output, one position on. It sees the first pass's keys before its position, and its own
    there: `seen` (tokens, 2 * tokens) says so."""
    recycled = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
    x = draft_input(embedded, recycled, w)
    q, k, v, gate = projections(rms(x, w["attn_norm"]), w, table)
    out = F.scaled_dot_product_attention(q, torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2), attn_mask=seen)
    x = x + gated_output(out, gate, w) * mask[0]
    y, _ = experts_layer(rms(x, w["post_attention_norm"]), w, routed)
    return rms(x + y * mask[1], w["nextn.shared_head_norm"])


class Model:
    """The pieces above, compiled, for one batch shape; `weights` are float32 leaves."""

    def __init__(self, weights: dict, batch: int, tokens: int, experts: str = "dense", compile: bool = True,
                 soft: float = 0.5):
        self.weights, self.batch, self.tokens, self.soft = weights, batch, tokens, soft
        self.routed = {"dense": dense_experts, "grouped": grouped_experts}[experts]
        self.blocks = [of_block(weights, i) for i in range(LAYERS + 1)]
        self.table = rope_table(tokens)
        ones = torch.ones(tokens, tokens, dtype=torch.bool, device=DEVICE)
        self.seen = torch.cat([ones.tril(-1), torch.eye(tokens, dtype=torch.bool, device=DEVICE)], dim=1)
        self.masks = torch.ones(LAYERS + 2, 2, batch, tokens, HIDDEN, dtype=HALF, device=DEVICE)
        make = (lambda f: torch.compile(f, dynamic=False)) if compile else (lambda f: f)
        self.delta, self.attention, self.first, self.second = map(
            make, (delta_layer, attention_layer, first_draft, second_draft))
        self.embed, self.trunk_loss, self.draft_loss = make(embedding), make(trunk_loss), make(draft_loss)

    def set_dropout(self, rate: float) -> None:
        if rate:
            self.masks.bernoulli_(1 - rate).mul_(1 / (1 - rate))
        else:
            self.masks.fill_(1.0)

    def trunk(self, ids):
        """ids (batch, tokens) -> the residual stream after the last layer, float32, and the balancing losses' sum."""
        x, balance = self.embed(ids, self.weights["token_embd.weight"]), 0.0
        for i in range(LAYERS):
            more = () if is_recurrent(i) else (self.table,)
            x, cost = (self.delta if is_recurrent(i) else self.attention)(
                x, self.blocks[i], *more, self.masks[i], self.routed)
            balance = balance + cost
        return x, balance

    def losses(self, ids):
        """ids (batch, tokens + 2) -> next-token, first-draft, second-draft and balancing loss, and for evaluation the
        trunk's hidden states and both drafts'."""
        ids, w, block = ids.long(), self.weights, self.blocks[LAYERS]
        embed, head, tokens = w["token_embd.weight"], w["output.weight"], self.tokens
        x, balance = self.trunk(ids[:, :tokens].contiguous())
        loss, hidden, logits = self.trunk_loss(x, w["output_norm.weight"], head, ids[:, 1:tokens + 1])
        ahead, after = self.embed(ids[:, 1:tokens + 1].contiguous(), embed), ids[:, 2:].contiguous()
        first, keys, values, cost = self.first(ahead, hidden, block, self.table, self.masks[LAYERS], self.routed)
        second = self.second(ahead, first, keys, values, block, self.table, self.seen, self.masks[LAYERS + 1],
                             self.routed)
        late = torch.cat([torch.full_like(after[:, :1], -1), after[:, 1:]], dim=1)
        return (loss, self.draft_loss(first, head, after, logits, self.soft),
                self.draft_loss(second, head, late, logits, self.soft), (balance + cost) / (LAYERS + 1),
                hidden, first, second)
