"""Bugs that chapter 05's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def by_the_series(original):
    """(I + L)^-1 by the series of squares: exact on paper, lost in float32 when a text repeats a key."""
    def inverse_of_unit_lower(lower):
        from tinygrad import Tensor
        size, power = lower.shape[-1], -lower
        result = Tensor.eye(size) + power
        while size > 2:
            power = (power @ power).contiguous()
            result, size = (result + result @ power).contiguous(), size // 2
        return result
    return inverse_of_unit_lower


def state_not_handed_on(original):
    """Every chunk starts from the state before the batch."""
    def chunked(q, k, v, g, beta, state, chunk=64):
        outs, last = [], state
        for start in range(0, v.shape[0], chunk):
            out, last = original(*(x[start:start + chunk] for x in (q, k, v, g, beta)), state)
            outs.append(out)
        return outs[0].cat(*outs[1:]), last
    return chunked


def wrong_keys(original):
    """Head j reads k-head j mod k_heads: right for Qwen3.5's files, wrong for these."""
    def share_heads(x, heads):
        return x.repeat(1, heads // x.shape[1], 1)
    return share_heads


BUGS = {
    "the inverse is the series of squares": ("minillama.delta_net", "inverse_of_unit_lower", by_the_series),
    "value heads share the wrong keys": ("minillama.delta_net", "share_heads", wrong_keys),
    "the state is not handed from chunk to chunk": ("minillama.delta_net", "chunked", state_not_handed_on),
}
