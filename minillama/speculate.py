"""Drafting and verifying: the MTP block guesses a few tokens, the model looks at all of them at once.

A round starts behind a text of P tokens and one more that was chosen but not read (the token at position P). The block
guesses the tokens at P + 1 .. P + n, one after the other, each from its own output before; the model then reads the
chosen token and all guesses in one pass, which says what it would have chosen after each. The guesses up to the first
wrong one stay, with the model's own choice behind them: 1 to n + 1 tokens a round, and the same text as without.

Nothing is copied to step back. Keys and values of rejected tokens lie behind the text, where nobody looks; the delta
nets' memories are a ring of n + 2 slots by position (`kernels.delta`), so that going on at an earlier position reads
the slot of that position. Source: Leviathan et al. 2023; llama.cpp #22673, which saves and restores the state.
"""
from collections.abc import Iterator
from time import perf_counter

import numpy as np
from tinygrad import Tensor, UOp, dtypes

from minillama import sampling
from minillama.layers import linear
from minillama.model import Place, forward, forward_mtp, norm_of, place_of
from minillama.mtp import kv_rows, remember_tokens
from minillama.pace import Pace
from minillama.sampling import Sampler
from minillama.state import KVChain, Pending, after, padded, put, stored

# ---- what to keep -------------------------------------------------------------------------------------------------


def outcome(matches: Tensor, drafts: Tensor, chosen: Tensor) -> Tensor:
    """Tokens and count of a round, (n + 2,) int32: the drafts up to the first that does not match and the token chosen
    there, then what lies behind, then how many drafts were accepted.

    matches (n,) 0 or 1; drafts (n,) int32; chosen (n + 1,) int32: what follows each verified token if it is the last.
    """
    count = drafts.shape[0]
    if not count:
        return chosen.cat(Tensor.zeros(1, dtype=dtypes.int32, device=chosen.device))
    so_far = Tensor.stack(*(matches[:i + 1].prod() for i in range(count)))  # 1 while all matched
    accepted = so_far.sum().cast(dtypes.int32).reshape(1)
    tokens = (Tensor.arange(count) < accepted).where(drafts, chosen[:count])
    return tokens.cat(chosen[count:], accepted)


def verify_greedy(drafts: Tensor, logits: Tensor) -> Tensor:
    """`outcome` where the likeliest token is always chosen. drafts (n,) int32, logits (n + 1, vocab)."""
    chosen = sampling.greedy(logits)
    return outcome((drafts == chosen[:drafts.shape[0]]).int(), drafts, chosen)


def verify_sampled(drafts: Tensor, guesses: list[Tensor], probs: list[Tensor], uniforms: Tensor) -> Tensor:
    """`outcome` where tokens are drawn: each of them then follows the model's distribution, whatever was drafted.

    drafts (n,) int32, drawn from `guesses`, n distributions (vocab,); probs, the model's n + 1; uniforms (n + 1,). A
    draft d is kept with probability min(1, p(d) / q(d)); the first that is not is replaced by a draw from
    max(p - q, 0), scaled to sum 1. Source: Leviathan et al. 2023, section 2.3 and appendix A.
    """
    count, vocab = drafts.shape[0], probs[0].shape[0]
    if not count:
        return outcome(drafts, drafts, sampling.draw(probs[0], uniforms))
    ids = Tensor.arange(vocab)
    kept, chosen = [], []
    for i, (p, q) in enumerate(zip(probs, guesses, strict=False)):
        mine = ids == drafts[i]
        p_draft, q_draft = (sampling.total(mine.where(x, 0)) for x in (p, q))
        keep = uniforms[i] * q_draft < p_draft
        left = (p - q).maximum(0).contiguous()
        left = (sampling.total(left) > 0).where(left, p).contiguous()
        # one uniform number does for both: given a rejection, what it lies above p / q is uniform again
        share = (p_draft / q_draft).minimum(1)
        again = ((uniforms[i] - share) / (1 - share).maximum(1e-7)).clip(0, 1 - 2 ** -24)
        kept.append(keep.int())
        chosen.append(sampling.draw(left, again.reshape(1)))
    chosen.append(sampling.draw(probs[count], uniforms[count:]))
    return outcome(Tensor.stack(*kept), drafts, chosen[0].cat(*chosen[1:]))


# ---- rounds -------------------------------------------------------------------------------------------------------


class Drafter:
    """Rounds of one engine: what the block has still to read, and how many drafts to make. Raises ValueError for a
    model without an MTP block."""

    def __init__(self, engine):
        if engine.weights.mtp is None:
            raise ValueError("this model has no multi-token-prediction block to draft with")
        self.engine, self.most = engine, engine.recipe.draft
        self.kv = kv_rows(engine.weights.mtp.layer.mixer, engine.config)
        self.pending = Pending.zeros(self.most + 1, engine.config.hidden, engine.device)
        self.base = UOp.variable("base", 0, engine.context)     # position of the first pending row
        self.last = UOp.variable("last", 0, max(self.most, 1))  # the row that the text ends with
        self.first: int | None = None                           # the value of `base`; None: nothing is pending
        self.known: list[int] = []                              # the pending tokens
        self.pace = Pace(self.most)

    def clear(self) -> None:
        self.first, self.known = None, []

    # ---- graphs: these build, `Engine.call` captures ----

    def follow(self, ids: Tensor, hidden: Tensor, at: Place) -> list[Tensor]:
        """The block's part of a prompt, as writes: ids (tokens,) are one position ahead of hidden (tokens, hidden)."""
        e = self.engine
        last = (at.tokens if at.valid is None else at.valid) - 1
        kept = stored(self.pending.hidden, hidden[last].reshape(1, -1), slice(0, 1))
        if e.recipe.mtp_prefill != "kv":
            return [kept, after(forward_mtp(ids, hidden, e.weights, e.config, e.recipe, e.state.mtp, e.table, at))]
        cache = KVChain(*e.state.mtp.tensors())
        self.remember(ids, hidden, at, cache)
        return [kept, cache.keys, cache.values]

    def remember(self, ids: Tensor, hidden: Tensor, at: Place, cache: KVChain) -> None:
        e = self.engine
        remember_tokens(ids, hidden, e.weights.mtp, self.kv, e.config, e.table, at, cache, norm_of(e.recipe))

    def catch_up(self, base: UOp) -> Tensor:
        """The block reads all pending rows."""
        cache, at = KVChain(*self.engine.state.mtp.tensors()), place_of(self.pending.tokens, base, None)
        self.remember(self.pending.tokens, self.pending.hidden, at, cache)
        return after(at.position, cache.keys, cache.values).realize()

    def round(self, count: int, kind: str, base: UOp, last: UOp, more: list[Tensor]) -> Tensor:
        """Catch up, draft `count` tokens, verify them. `kind` as in `run`. Returns `outcome`."""
        e, w, cache = self.engine, self.engine.weights, KVChain(*self.engine.state.mtp.tensors())
        tokens, states = self.pending.tokens, self.pending.hidden
        self.remember(tokens, states, place_of(tokens, base, None), cache)
        token = tokens[last].reshape(1).contiguous()
        hidden = states[last].reshape(1, -1).contiguous()
        ids, guesses = [token], []
        for i in range(count):
            at = place_of(token, base + last + i, None)
            hidden = forward_mtp(ids[-1], hidden, w, e.config, e.recipe, cache, e.table, at)
            logits = linear(hidden, w.mtp.head)                             # (1, vocab)
            if kind == "sampled":
                guesses.append(sampling.cut(logits.reshape(-1), *more[1:]))
                ids.append(sampling.draw(guesses[-1], more[0][i:i + 1]))
            else:
                ids.append(sampling.greedy(logits))
        batch = ids[0].cat(*ids[1:]).contiguous() if count else token       # (count + 1,)
        hidden = forward(batch, w, e.config, e.recipe, e.state, e.table, place_of(batch, base + last + 1, None))
        logits = linear(hidden, w.head)                                     # (count + 1, vocab)
        drafts = batch[1:]
        if kind == "sampled":
            probs = [sampling.cut(row, *more[1:]) for row in logits.contiguous()]
            found = verify_sampled(drafts, guesses, probs, more[0][count:])
        elif kind == "simulated":
            found = outcome(more[0], drafts, sampling.greedy(logits))
        else:
            found = verify_greedy(drafts, logits)
        found, rows = found.contiguous(), slice(0, count + 1)
        writes = [stored(tokens, found[:count + 1], rows), stored(states, hidden, rows)]
        if not count:               # else drafts read what was written, which makes it part of the graph
            writes += [cache.keys, cache.values]
        return after(found, *writes).realize()

    # ---- what an engine calls ----

    def before_prompt(self, following: int) -> None:
        """The token behind the text is known: let the block read what is pending."""
        if self.first is None:
            return
        row = self.engine.position - 1 - self.first
        self._put_tokens([*self.known[:row], following])
        self.engine.call(("catch-up", self.most), self.catch_up, self.base.bind(self.first))
        self.first = None

    def after_prompt(self) -> None:
        self.first, self.known = self.engine.position - 1, []

    def _put_tokens(self, tokens: list[int]) -> None:
        put(self.pending.tokens, padded(tokens, self.most + 1))

    def run(self, token: int | None, count: int, kind: str, *more: Tensor) -> list[int]:
        """One round: the tokens it found, the last of which is not yet part of the text.

        token: the one behind the text, where a prompt came before; None: the last round's last. kind: "greedy";
        "sampled", with uniforms (2 * count + 1,) and the sampler's settings; "simulated", with matches (count,).
        """
        e = self.engine
        if token is not None:
            self._put_tokens([token])
            self.known = [token]
        last = e.position - 1 - self.first
        found = e.call((f"round {kind}", count), lambda base, last, more: self.round(count, kind, base, last, more),
                       self.base.bind(self.first), self.last.bind(last), list(more)).tolist()
        accepted = found[-1]
        self.first, self.known = e.position, found[:-1]
        e.position += accepted + 1
        return found[:accepted + 1]

    def generate(self, token: int, count: int, sampler: Sampler, settings: list[Tensor], adapt: bool) -> Iterator[int]:
        """Yield up to `count` ids that follow `token`, which is not part of the text yet."""
        e, kind, random = self.engine, "greedy" if sampler.greedy else "sampled", sampler.stream()
        while count:
            length = self.pace.choose() if adapt else self.most
            fresh, began = (f"round {kind}", length) not in e.steps, perf_counter()
            more = [] if sampler.greedy else [
                e.input("uniforms", random.random(2 * length + 1, dtype=np.float32)), *settings]
            tokens = self.run(token, length, kind, *more)
            self.pace.note(length, len(tokens) - 1, None if fresh else perf_counter() - began)
            token, end = None, e.position
            for index, found in enumerate(tokens[:count]):
                e.position = end - len(tokens) + 1 + index      # a caller may stop here: the rest is then forgotten
                yield found
                if e.position == e.context:
                    return
            count -= min(count, len(tokens))
