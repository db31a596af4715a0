"""Bugs of one line that chapter 03's *equal?* cells must catch: what is wrong -> (module, attribute, replacement)."""


def one_is_forgotten(original):
    """The norm's weight is read as the checkpoint stores it, less 1, though the file has added the 1 already."""
    return lambda x, weight, eps: original(x, weight - 1, eps)


def neighbours_are_paired(original):
    """The rotation turns dimension 2i with 2i + 1, in place of i with i + half."""
    def rope(x, table):
        dims = 2 * table.shape[-1]
        paired = x[..., :dims].reshape(*x.shape[:-1], -1, 2).transpose(-1, -2).reshape(*x.shape[:-1], dims)
        turned = original(paired, table).reshape(*x.shape[:-1], 2, -1).transpose(-1, -2).reshape(*x.shape[:-1], dims)
        return turned.cat(x[..., dims:], dim=-1)
    return rope


def the_future_is_seen(original):
    """Each token looks one position too far."""
    return lambda q, k, v, start: original(q, k, v, start + 1)


BUGS = {
    "the norm takes 1 from its weight": ("minillama.layers", "rms_norm", one_is_forgotten),
    "the rotation pairs neighbours": ("minillama.layers", "rope", neighbours_are_paired),
    "the mask lets each token see the next one": ("minillama.attention", "attend", the_future_is_seen),
}
