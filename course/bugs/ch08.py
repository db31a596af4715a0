"""Bugs of one line that chapter 08's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def heads_tiled(original):
    """Heads 0 1 0 1 in place of 0 0 1 1: the order of the qwen35 family."""
    return lambda x, heads: x.repeat(1, heads // x.shape[1], 1)


def no_state_between_chunks(original):
    """Every chunk but the first of a prompt is computed as if it came first."""
    def chunked(q, k, v, g, beta, state, chunk=64):
        size = min(chunk, v.shape[0])
        outs = [original(*(x[at:at + size] for x in (q, k, v, g, beta)), state, chunk)
                for at in range(0, v.shape[0], size)]
        return outs[0][0].cat(*(out for out, _ in outs[1:])), outs[-1][1]
    return chunked


BUGS = {
    "heads are shared in the wrong order": ("minillama.delta_net", "share_heads", heads_tiled),
    "the memory does not pass from chunk to chunk": ("minillama.delta_net", "chunked", no_state_between_chunks),
}
