"""Bugs of one line that chapter 13's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from dataclasses import replace

from tinygrad import Tensor


def expert_of_the_tile_before(original):
    """A tile reads the expert of the tile before it."""
    def group(ids, experts):
        made = original(ids, experts)
        return replace(made, experts=Tensor.cat(made.experts[:1], made.experts[:-1]).contiguous())
    return group


def gate_and_up_swapped(original):
    """The tile kernel takes up for gate: silu of the wrong half."""
    return lambda x, gate, up, groups, share: original(x, up, gate, groups, share)


BUGS = {
    "a tile reads the expert of the tile before it": ("minillama.kernels.groups", "group", expert_of_the_tile_before),
    "the tile kernel swaps gate and up": ("minillama.kernels.groups", "gated", gate_and_up_swapped),
}
