"""Bugs of one line that chapter 16's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from dataclasses import replace


def one_position_late(original):
    """Keys and values of a prompt are stored one position behind where they belong."""
    def remember(x, w, kv, config, table, at, cache):
        late = replace(at, start=at.start + 1, position=(at.position + 1).contiguous())
        original(x, w, kv, config, table, late, cache)
    return remember


def halves_swapped(original):
    """What the block reads is joined the wrong way round: hidden state first, embedding second."""
    def mtp_input(ids, hidden, w, config, norm=None):
        width = w.project.shape[1] // 2
        swapped = w.project[:, width:].cat(w.project[:, :width], dim=1)
        return original(ids, hidden, replace(w, project=swapped), config, *([norm] if norm else []))
    return mtp_input


BUGS = {
    "a prompt's keys and values are stored one position late": ("minillama.mtp", "remember", one_position_late),
    "the block's two inputs are joined in the wrong order": ("minillama.mtp", "mtp_input", halves_swapped),
}
