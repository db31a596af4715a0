"""Captured steps on a CPU as one call: a C function goes down a list of kernels, not Python.

tinygrad has graphs for CUDA and Metal. On a CPU it replays a captured step kernel by kernel in Python, which takes
longer than most kernels of a small model run (12 µs each on a server's core). Here the list becomes a table of words,
for each kernel its address, how many arguments it has, and these; what differs from replay to replay is written into
the table.

As in tinygrad's own worker for CPUs, a kernel is called with whole words, and perhaps with more of them than it takes.
"""
import ctypes
import os
import time

from tinygrad import Device
from tinygrad.device import MultiBuffer, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.ops_cpu import MAX_ARGS
from tinygrad.uop.ops import UOp

HEAD = 2                        # words before a kernel's arguments: its address, their number
SIZES = (8, 16, MAX_ARGS)       # arguments of a call in C


def source(sizes: tuple[int, ...] = SIZES) -> str:
    """The function that calls `count` kernels, one after the other; `sizes`: arguments that a call has."""
    def call(size: int) -> str:
        words, given = ", ".join(["word"] * size), ", ".join(f"at[{HEAD + n}]" for n in range(size))
        return f"if (at[1] <= {size}) ((void (*)({words}))at[0])({given});"
    cases = "\n    else ".join(map(call, sizes))
    return ("typedef unsigned long long word;\n"
            "void replay(word* at, word count) {\n"
            f"  for (; count; count--, at += {HEAD} + at[1]) {{\n    {cases}\n  }}\n}}\n")


class CPUGraph(GraphRunner):
    """The kernels of a captured step, replayed by one call."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        words, self.places, self.values = [], {}, {}        # of the table: by call and argument, by call and variable
        for n, ((_, program, buffers, known), runtime) in enumerate(zip(self.calls, self.runtimes, strict=True)):
            info, first = program.arg, len(words) + HEAD
            self.places |= {(n, i): first + place for place, i in enumerate(info.globals)}
            self.values |= {(n, i): first + len(info.globals) + i for i in range(len(info.vars))}
            words += [runtime.addr, len(info.globals) + len(info.vars)]
            words += [address(buffers[i]) for i in info.globals] + [known.get(v.expr, 0) for v in info.vars]
        self.table = (ctypes.c_uint64 * (len(words) + MAX_ARGS))(*words)
        self.given = [(self.places[n, i], slot) for n, pairs in enumerate(self.uop_replace) for i, slot in pairs
                      if (n, i) in self.places]
        at = Device[self.device]
        self.replay = at.runtime(TinyELF(at.compiler.compile_cached(source()), "replay", at.renderer.target, ()))

    def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
        for place, slot in self.given:
            self.table[place] = address(input_uops[slot].buffer)
        for n, i, value in self.updated_vars(var_vals):
            self.table[self.values[n, i]] = value
        began = time.perf_counter()
        self.replay.fxn(ctypes.c_uint64(ctypes.addressof(self.table)), ctypes.c_uint64(len(self.calls)))
        return time.perf_counter() - began if wait else None

    @staticmethod
    def supports_uop(batch_devs: list, new_call: UOp) -> bool:
        """One device, whose kernels clang compiles for a Unix; those that tinygrad divides among threads stay with
        it."""
        return (GraphRunner.supports_uop(batch_devs, new_call) and not new_call.src[0].arg.runtimevars
                and isinstance(batch_devs[0].renderer, ClangRenderer) and os.name == "posix")


def address(buffer) -> int:
    """Where a buffer's first byte is."""
    if isinstance(buffer, MultiBuffer):
        raise NotImplementedError("a buffer on several CPU devices")
    return buffer.ensure_allocated()._buf.va_addr
