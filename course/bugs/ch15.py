"""Bugs of one line that chapter 15's *Equal?* cells must catch: (module, attribute, original -> broken)."""


def two_slots(original):
    """Memories alternate between two slots, however many there are: enough for plain decoding, not for stepping back.
    (The convolution's ring, which has 16, is left as it is.)"""
    return lambda position, offset, slots: original(position, offset, slots if slots == 16 else 2)


def any_match_counts(original):
    """A draft that matches counts although one before it did not."""
    def outcome(matches, drafts, chosen):
        found = original(matches, drafts, chosen)
        return found[:-1].cat(matches.sum().cast(found.dtype).reshape(1)) if drafts.shape[0] else found
    return outcome


BUGS = {
    "memories alternate between two slots": ("minillama.kernels.delta", "slot_of", two_slots),
    "a draft behind a rejected one counts": ("minillama.speculate", "outcome", any_match_counts),
}
