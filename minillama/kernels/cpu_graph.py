"""Captured steps on a CPU as one call: a C function goes down a list of kernels, not Python.

tinygrad has graphs for CUDA and Metal. On a CPU it replays a captured step kernel by kernel in Python, which takes
longer than most kernels of a small model run (12 µs each on a server's core). Here the list becomes a table of words,
for each kernel its address, how many arguments it has, and these; what differs from replay to replay is written into
the table.

Kernels may have *parts*, which differ in one argument; tinygrad 0.14 runs them one after the other. Here all cores go
down the list, and each takes the next part of a kernel that nobody has taken yet; once all parts of one are done, they
go on to the next. So a core that is late, or busy with something else, is not waited for.

As in tinygrad's own worker for CPUs, a kernel is called with whole words, and perhaps with more of them than it takes.
"""
import ctypes
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache

import numpy as np
from tinygrad import Device
from tinygrad.device import MultiBuffer, TinyELF
from tinygrad.engine.jit import GraphRunner
from tinygrad.helpers import NUM_CPU_THREADS
from tinygrad.renderer.cstyle import ClangRenderer
from tinygrad.runtime.ops_cpu import MAX_ARGS
from tinygrad.uop.ops import UOp

HEAD = 5                        # words before a kernel's arguments: its address, their number, that of its parts,
TAKEN, DONE = 3, 4              # and how many of these are taken and done; then come the arguments, for each part
SIZES = (8, 16, MAX_ARGS)       # arguments of a call in C
PATIENCE = 2000                 # looks at what others do before their core is lent to whoever needs it


def source(sizes: tuple[int, ...] = SIZES) -> str:
    """The function that calls `count` kernels, one after the other, alone or with others; `sizes`: arguments that a
    call has."""
    def call(size: int) -> str:
        words, given = ", ".join(["word"] * size), ", ".join(f"given[{n}]" for n in range(size))
        return f"if (count <= {size}) ((void (*)({words}))kernel)({given});"
    cases = "\n  else ".join(map(call, sizes))
    return f"""typedef unsigned long long word;
static void call(word kernel, word count, word* given) {{
  {cases}
}}
void replay(word* at, word count, word alone, void (*rest)(void)) {{
  for (; count; count--, at += {HEAD} + at[1] * at[2]) {{
    if (alone) {{
      for (word part = 0; part < at[2]; part++) call(at[0], at[1], at + {HEAD} + part * at[1]);
      continue;
    }}
    for (word part; (part = __atomic_fetch_add(at + {TAKEN}, 1, __ATOMIC_RELAXED)) < at[2];) {{
      call(at[0], at[1], at + {HEAD} + part * at[1]);
      __atomic_fetch_add(at + {DONE}, 1, __ATOMIC_RELEASE);
    }}
    for (word looks = 1; __atomic_load_n(at + {DONE}, __ATOMIC_ACQUIRE) < at[2]; looks++)
      if (looks % {PATIENCE} == 0) rest();
  }}
}}
"""


@cache
def helpers(count: int) -> ThreadPoolExecutor:
    """Threads for so many cores, one more of which is that of the caller."""
    return ThreadPoolExecutor(count)


class CPUGraph(GraphRunner):
    """The kernels of a captured step, replayed by one call."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        # of the table: words; where each kernel begins; and where values stand, by call and argument or variable
        words, heads, self.places, self.values, most = [], [], {}, {}, 1
        for n, ((_, program, buffers, known), runtime) in enumerate(zip(self.calls, self.runtimes, strict=True)):
            info, first = program.arg, len(words) + HEAD
            size, parts = len(info.globals) + len(info.vars), info.global_size[0] if info.runtimevars else 1
            rows = range(first, first + size * parts, size)
            self.places |= {(n, i): [row + place for row in rows] for place, i in enumerate(info.globals)}
            self.values |= {(n, i): [row + len(info.globals) + i for row in rows] for i in range(len(info.vars))}
            heads.append(len(words))
            words += [runtime.addr, size, parts, 0, 0]
            for part in range(parts):
                words += [address(buffers[i]) for i in info.globals]
                words += [part if v.expr in info.runtimevars else known.get(v.expr, 0) for v in info.vars]
            most = max(most, parts)
        self.table = (ctypes.c_uint64 * (len(words) + MAX_ARGS))(*words)
        self.words, self.heads = np.frombuffer(self.table, dtype=np.uint64), np.array(heads)
        self.given = [(place, slot) for n, pairs in enumerate(self.uop_replace) for i, slot in pairs
                      for place in self.places.get((n, i), ())]
        at = Device[self.device]
        self.replay = at.runtime(TinyELF(at.compiler.compile_cached(source()), "replay", at.renderer.target, ()))
        self.rest = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
        self.threads = min(most, NUM_CPU_THREADS.value)
        self.helping: list[Future] = []

    def __call__(self, input_uops: tuple[UOp, ...], var_vals: dict[str, int], wait: bool = False) -> float | None:
        for helper in self.helping:         # who comes late, and finds that all is done, still looks at the table
            helper.result()
        for place, slot in self.given:
            self.table[place] = address(input_uops[slot].buffer)
        for n, i, value in self.updated_vars(var_vals):
            for place in self.values[n, i]:
                self.table[place] = value
        began = time.perf_counter()
        if self.threads > 1:
            self.words[self.heads + TAKEN] = self.words[self.heads + DONE] = 0
            others = self.threads - 1
            self.helping = []
            for _ in range(others):
                self.helping.append(helpers(others).submit(self.run))
        self.run()
        return time.perf_counter() - began if wait else None

    def run(self) -> None:
        """Go down the list."""
        self.replay.fxn(*map(ctypes.c_uint64, (
            ctypes.addressof(self.table), len(self.calls), self.threads == 1, self.rest)))

    @staticmethod
    def supports_uop(batch_devs: list, new_call: UOp) -> bool:
        """One device, whose kernels clang compiles for a Unix, and no more arguments than a call has."""
        if not GraphRunner.supports_uop(batch_devs, new_call):
            return False
        info = new_call.src[0].arg
        return (len(info.globals) + len(info.vars) <= MAX_ARGS
                and isinstance(batch_devs[0].renderer, ClangRenderer) and os.name == "posix")


def address(buffer) -> int:
    """Where a buffer's first byte is."""
    if isinstance(buffer, MultiBuffer):
        raise NotImplementedError("a buffer on several CPU devices")
    return buffer.ensure_allocated()._buf.va_addr
