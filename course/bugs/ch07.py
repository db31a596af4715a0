"""Bugs of one line that chapter 07's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def padding_is_text(original):
    """The mask is ignored: padded tokens decay the memory and write into it."""
    return lambda x, w, config, delta, window, state, valid=None: original(x, w, config, delta, window, state, None)


def nucleus_off_by_a_little(original):
    """Top-p (and top-k) stop one bit too early: the threshold is a little too high, and the last entry falls out."""
    return lambda probs, weight, goal: original(probs, weight, goal) * 1.0001


BUGS = {
    "padded tokens write into the memory": ("minillama.delta_net", "delta_net", padding_is_text),
    "top-k and top-p lose the last token that they should keep": ("minillama.sampling", "threshold",
                                                                 nucleus_off_by_a_little),
}
