"""Kernels lowered once a machine, not once a process.

tinygrad keeps compiled binaries on disk, but lowers every kernel again in every process to find out which binary it
wants. Here the lowered programs go to disk as well, in tinygrad's own cache file, under the key by which tinygrad
finds them in memory. Like its binaries they are this machine's ("native"): no folder to share between processors.
CACHELEVEL=0 turns both off.

Here, too, a program's counts become numbers. tinygrad multiplies a kernel's operations and bytes by the length of
every loop around them; where that is something that the kernel loads, it would fail when it adds up. Of a loop that
ends by a condition it knows no length: whoever writes such a kernel says what it costs (`at_most`).
"""
from dataclasses import replace
from importlib.metadata import version
from math import prod
from typing import Any

from tinygrad import codegen, dtypes
from tinygrad.engine import realize
from tinygrad.helpers import diskcache_get, diskcache_put
from tinygrad.renderer import Estimates
from tinygrad.uop.ops import Ops, UOp, sint

said: dict[str, Estimates] = {}     # what kernels cost, by name
TABLE = f"minillama_programs_{version('tinygrad')}"      # lowering changes with every release


def disk_key(key: tuple) -> str:
    """tinygrad's key of a program as text: the kernel, the renderer, its target and the settings that shape code."""
    kernel, renderer, *settings = key
    return f"{kernel.hex()} {renderer.__module__}.{renderer.__qualname__} {settings!r}"


def at_most(name: str, products: int, *buffers: UOp) -> str:
    """The kernel's name; as said here, it costs so many products, and each buffer's bytes once."""
    install()
    moved = sum(prod(buffer.shape) * buffer.dtype.itemsize for buffer in buffers)
    said[name] = Estimates(2 * products, moved, moved)
    return name


def largest(count: sint) -> sint:
    """A count as it is, or the largest it can be where it depends on what is loaded."""
    if not isinstance(count, UOp) or not any(u.op is Ops.LOAD for u in count.toposort()):
        return count
    bounds = [part.vmax for part in count.toposort() if dtypes.is_int(part.dtype)]  # from below: sums may be deep
    return int(bounds[-1])


def countable(program: UOp) -> UOp:
    """The program, its loops of unknown length counted as often as they can run, or as was said."""
    kernel, *rest = program.src
    found = kernel.arg.estimates
    bounds = said.get(kernel.arg.name) or found and Estimates(*map(largest, (found.ops, found.lds, found.mem)))
    if bounds == found:
        return program
    return program.replace(src=(kernel.replace(arg=replace(kernel.arg, estimates=bounds)), *rest))


class Programs(dict):
    """Stands in for tinygrad's `to_program_cache`: what is not in memory is looked for on disk."""

    def __contains__(self, key: Any) -> bool:
        return self.get(key) is not None

    def get(self, key: Any, default: UOp | None = None) -> UOp | None:
        if (program := super().get(key)) is None and (program := diskcache_get(TABLE, disk_key(key))) is not None:
            program = countable(program)
            super().__setitem__(key, program)
        return default if program is None else program

    def __getitem__(self, key: Any) -> UOp:
        if (program := self.get(key)) is None:
            raise KeyError(key)
        return program

    def __setitem__(self, key: Any, program: UOp) -> None:
        program = countable(program)
        super().__setitem__(key, program)
        diskcache_put(TABLE, disk_key(key), program)


def install() -> None:
    """Put the cache in place of tinygrad's, once; programs already in memory stay."""
    if not isinstance(codegen.to_program_cache, Programs):
        programs = Programs(codegen.to_program_cache)
        codegen.to_program_cache = realize.to_program_cache = programs
