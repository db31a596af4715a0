"""Bugs of one line that chapter 02's *equal?* cells must catch: what is wrong -> (module, attribute, replacement)."""


def nothing_is_stored(original):
    """The reader gets the buffer as it was: it does not wait for the write, which never happens."""
    return lambda buffer, values, rows=None: buffer


def no_copy_is_seen(original):
    """Copies are counted as kernels that compute."""
    return lambda call: False


BUGS = {
    "a row that was stored is not in the cache": ("minillama.state", "stored", nothing_is_stored),
    "copies are not counted as copies": ("minillama.measure", "is_copy", no_copy_is_seen),
}
