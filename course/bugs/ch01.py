"""Bugs of one line that chapter 01's *equal?* cells must catch: what is wrong -> (module, attribute, replacement)."""
import numpy as np


def neighbours_share_a_byte(original):
    """Low and high half of a byte become neighbours, instead of lying sixteen values apart."""
    return lambda packed, width: np.stack((packed & 15, packed >> 4), axis=2).reshape(len(packed), -1)


def merges_backwards(original):
    """The merge list read from its end: rare pairs first."""
    return lambda tokens, merges, pattern: original(tokens, merges[::-1], pattern)


BUGS = {
    "the two values of a byte are taken for neighbours": ("minillama.blocks", "_nibbles", neighbours_share_a_byte),
    "the tokenizer merges the rarest pairs first": ("minillama.tokenizer", "_build_bpe", merges_backwards),
}
