"""Bugs of one line that chapter 14's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def halves_swapped(original):
    """The block's projection reads [hidden state | embedding] instead of [embedding | hidden state]."""
    def mtp_input(ids, hidden, w, config, norm=None):
        from minillama.layers import linear, lookup, rms_norm
        embedded = rms_norm(lookup(w.embed, ids), w.embed_norm, config.norm_eps)
        return linear(rms_norm(hidden, w.hidden_norm, config.norm_eps).cat(embedded, dim=-1), w.project)
    return mtp_input


def all_matches_count(original):
    """A draft that matches is counted even where one before it did not."""
    def outcome(matches, drafts, chosen):
        found = original(matches, drafts, chosen)
        return found[:-1].cat(matches.sum().cast(found.dtype).reshape(1))
    return outcome


def guesses_are_certain(original):
    """A sampled draft is judged as if the block had been certain of it: kept with probability p instead of p / q."""
    return lambda drafts, guesses, probs, uniforms: original(drafts, [q * 0 + 1 for q in guesses], probs, uniforms)


BUGS = {
    "the block reads its two inputs the wrong way round": ("minillama.mtp", "mtp_input", halves_swapped),
    "a match counts behind a draft that was wrong": ("minillama.speculate", "outcome", all_matches_count),
    "a sampled draft is judged as if it had been certain": ("minillama.speculate", "verify_sampled",
                                                            guesses_are_certain),
}
