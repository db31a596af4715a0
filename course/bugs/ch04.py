"""Bugs that chapter 04's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def forgets_after_writing(original):
    """The decay comes after the write, so the answer is given from the old memory and the new pair fades at once."""
    def recurrent(q, k, v, g, beta, state):
        outs = []
        for t in range(v.shape[0]):
            out, state = original(*(x[t:t + 1] for x in (q, k, v)), g[t:t + 1] * 0, beta[t:t + 1], state)
            state = state * g[t].exp().reshape(-1, 1, 1)
            outs.append(out)
        return outs[0].cat(*outs[1:]), state
    return recurrent


def looks_one_token_ahead(original):
    """The convolution's window is shifted by one token towards the future."""
    def causal_conv(past, weight):
        shape = (1, *past.shape[1:])
        return original(past[1:].cat(past[-1:].reshape(shape) * 0, dim=0), weight)
    return causal_conv


def keys_twice_as_long(original):
    """Keys of length 2 in place of 1: a write overshoots."""
    def l2_norm(x, eps=1e-6):
        return original(x, eps) * 2
    return l2_norm


def heads_keep_their_size(original):
    """The heads' answers reach the output gate as they come, without their norm."""
    return lambda x, weight, eps: x


BUGS = {
    "the decay comes after the write": ("minillama.delta_net", "recurrent", forgets_after_writing),
    "the convolution sees the next token": ("minillama.delta_net", "causal_conv", looks_one_token_ahead),
    "queries and keys are not of length 1": ("minillama.delta_net", "l2_norm", keys_twice_as_long),
    "the heads' answers are not normed": ("minillama.delta_net", "rms_norm", heads_keep_their_size),
}
