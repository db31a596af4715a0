"""Bugs of one line that chapter 13's *Equal?* cells must catch: (module, attribute, original -> broken)."""
from dataclasses import replace

from tinygrad import Tensor, dtypes


def expert_of_the_tile_before(original):
    """A tile reads the expert of the tile before it."""
    def group(ids, experts):
        made = original(ids, experts)
        return replace(made, experts=Tensor.cat(made.experts[:1], made.experts[:-1]).contiguous())
    return group


def gate_and_up_swapped(original):
    """The experts' first kernel takes up for gate: silu of the wrong half."""
    return lambda x, gate, up, share, blocks: original(x, up, gate, share, blocks)


def low_halves_lost(original):
    """x in two halves, of which the low ones are zero."""
    def halves(x, layout):
        rough = (x.contiguous().bitcast(dtypes.uint32) & 0xffffe000).bitcast(dtypes.float32)
        return original(rough.contiguous().realize(), layout)
    return halves


def last_parts_left_out(original):
    """Where parts do not divide the rows or tokens, the last one is done where the one before it was."""
    def parts(self, size, each, shared=False):
        return original(self, size // each * each, each, shared)
    return parts


BUGS = {
    "a tile reads the expert of the tile before it": ("minillama.kernels.groups", "group", expert_of_the_tile_before),
    "a CPU's experts swap gate and up": ("minillama.kernels.panel_experts", "gated", gate_and_up_swapped),
    "the low halves of x are lost": ("minillama.kernels.halves", "halves", low_halves_lost),
    "rows behind the last whole panel are left out": ("minillama.kernels.panels", "Panels.parts", last_parts_left_out),
}
