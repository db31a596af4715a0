"""Bugs of one line that appendix A2's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def gradient_stops_at_the_border(original):
    """Forwards all is right; backwards nothing passes from a chunk to the one before."""
    def chunked(q, k, v, g, beta, state, chunk=64):
        outs = []
        for start in range(0, v.shape[0], chunk):
            out, state = original(*(x[start:start + chunk] for x in (q, k, v, g, beta)), state, chunk)
            outs.append(out)
            state = state.detach() if start + chunk < v.shape[0] else state
        return outs[0].cat(*outs[1:]), state
    return chunked


def blind_to_choices(original):
    """An expert's share of the choices is taken for its mean probability."""
    def balance(every, chosen):
        return every.mean(axis=0).square().sum() * every.shape[-1]
    return balance


def no_warm_up(original):
    """The rate is at its peak from the first step on."""
    return lambda training, step: original(training, max(step, training.warmup))


BUGS = {
    "the gradient stops at a chunk's border": ("minillama.delta_net", "chunked", gradient_stops_at_the_border),
    "the balance does not see who was chosen": ("minillama.train", "balance", blind_to_choices),
    "there is no warm-up": ("minillama.train", "Training.rate_at", no_warm_up),
}
