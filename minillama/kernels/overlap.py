"""CUDA graphs whose kernels start before the one before them has ended ("programmatic dependent launch").

A token's kernels run for a few microseconds each, and to start one, to ask for its first weights and to wait for the
last thread costs as much again. NVIDIA's GPUs from Hopper on can start a kernel once all blocks of the one before it
run: it reads what is settled (weights, states), and *waits* before it reads what the other is about to write.

What is settled the graph knows: all that the kernel just before does not write. So a captured kernel is compiled once
more, with its settled reads first, then the wait, then all else. The kernels form a chain, and each lets the next one
start only after its own wait: when a kernel starts, all but the one just before it have ended.

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.
"""
import ctypes
import re
from dataclasses import replace
from functools import cache
from math import prod

from tinygrad import Device
from tinygrad.device import Buffer
from tinygrad.engine.jit import MultiGraphRunner
from tinygrad.runtime.autogen import cuda
from tinygrad.runtime.graph.cuda import CUDAGraph
from tinygrad.runtime.ops_cuda import check
from tinygrad.runtime.support.c import init_c_var
from tinygrad.uop.ops import Ops, UOp

WAIT = '  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");'
PROGRAMMATIC = (ctypes.c_ubyte * 8)(1, 0, 1)    # a CUgraphEdgeData: from which port, to which, of which type
HOPPER = 90                                     # its compute capability, times ten
LINE = 128                                      # bytes of a cache line: what one read may bring along
RECENT = 16     # calls: what the last ones wrote lies in the cache; to read it early would only take registers
SHARE = 6       # blocks a multiprocessor, at most, for early reads: of more, most start when there is no wait left
MOST = 64       # early reads where some are looked up by others (an H200: sums over experts, 10 to 22 instead of 6 µs)

REGISTERS, PLENTY = 65536, 112  # of a multiprocessor; of a thread, from which on early reads fit beside the rest

BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")
SIGNATURE = re.compile(r'extern "C" __global__[^{]*? \w+\(([^{]*)\) \{\n')
DECLARED = re.compile(r"  [a-z]\w* (\w+) = ")   # "  float4 val3 = ...;", in the straight beginning of a kernel
STRAIGHT_UNTIL = ("  *", "  if", "  for", "  __sync")


def waiting(source: str, fresh: frozenset[int], early: frozenset[int] = frozenset(),
            share: int = 0) -> str:
    """A kernel's CUDA source with the wait in it. Before it come, out of the kernel's straight beginning, reads of the
    arguments `early` (by position) whose addresses depend on none of the arguments `fresh`; after it all else. (Of
    many reads whose addresses are read, too, none come before it: then later blocks wait twice, and registers spill.)

    `share`: blocks that a multiprocessor gets where they are spread evenly. If they can have registers in plenty, the
    compiler is told: early reads need them, but not so many that blocks are left over for a second turn.
    """
    signature = SIGNATURE.search(source)
    start = signature.end()
    arrays = [part.split()[-1] for part in signature[1].split(", ") if "*" in part]
    tainted, wanted = ({arrays[i] for i in which} for which in (fresh, early))
    lines, declared, reads = source[start:].split("\n"), {}, []
    for n, line in enumerate(lines):
        if line.startswith(STRAIGHT_UNTIL):
            break
        if match := DECLARED.match(line):
            used, declared[match[1]] = set(re.findall(r"\w+", line)), n
            if used & tainted:
                tainted.add(match[1])
            elif used & wanted:
                reads.append(n)
    first: set[int] = set()
    while reads:                                        # with what their addresses are made of
        if (n := reads.pop()) not in first:
            first.add(n)
            reads += [declared[word] for word in re.findall(r"\w+", lines[n].split("=", 1)[1]) if word in declared]
    if len(found := [n for n in first if set(re.findall(r"\w+", lines[n])) & set(arrays)]) > MOST:
        looked_up = {DECLARED.match(lines[n])[1] for n in found}
        if any(looked_up & set(re.findall(r"\w+", lines[n].split("=", 1)[1])) for n in first):
            first = set()
    rest = [line for n, line in enumerate(lines) if n not in first]
    head, bounds = source[:start], BOUNDS.search(source)
    if first and share and REGISTERS // (share * int(bounds[1])) >= PLENTY:
        head = head.replace(bounds[0], f"__launch_bounds__({bounds[1]}, {share})")
    return head + "\n".join([*(lines[n] for n in sorted(first)), WAIT, *rest])


Call = tuple[int, UOp, list[Buffer], dict[str, int]]    # as tinygrad's graphs keep them


def touches(a: Buffer, b: Buffer) -> bool:
    """Whether two buffers have a cache line in common."""
    return (a.base is b.base and a.offset // LINE <= (b.offset + b.nbytes - 1) // LINE
            and b.offset // LINE <= (a.offset + a.nbytes - 1) // LINE)


def written_by(others: list[Call], call: Call) -> frozenset[int]:
    """The positions of a call's arguments that other calls write."""
    written = [buffers[i] for _, program, buffers, _ in others if program.op is Ops.PROGRAM for i in program.arg.outs]
    return frozenset(i for i, mine in enumerate(call[2]) if any(touches(mine, other) for other in written))


def blocks_of(program: UOp) -> int:
    """How many blocks run a kernel; of sizes that vary, 1 is counted."""
    return prod(size if isinstance(size, int) else 1 for size in program.arg.global_size)


def early_reads(calls: list[Call], n: int) -> frozenset[int]:
    """The positions of call n's arguments that are worth reading before it waits."""
    return frozenset(range(len(calls[n][2]))) - written_by(calls[max(0, n - RECENT):n], calls[n])


@cache
def multiprocessors(device: str) -> int:
    count = ctypes.c_int()
    check(cuda.cuDeviceGetAttribute(ctypes.byref(count), cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                                    Device[device].cu_device))
    return count.value


@cache
def waiting_runtime(program: UOp, device: str, fresh: frozenset[int], early: frozenset[int]):
    """The program with the wait in it, compiled and loaded."""
    share = -(-blocks_of(program) // multiprocessors(device))
    few = (early, share) if share <= SHARE else ()
    lib = Device[device].compiler.compile_cached(waiting(program.src[2].arg, fresh, *few))
    return Device[device].runtime(replace(program.to_elf(), lib=lib))


@cache
def driver() -> ctypes.CDLL:
    """The driver's library: tinygrad 0.14 does not bind the one call that is needed."""
    return ctypes.CDLL("libcuda.so.1")


class Chain(MultiGraphRunner):
    """Stands between tinygrad's graph and its base: by then the calls are known, and no node is made yet."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        kernels = [call[1].op is Ops.PROGRAM for call in self.calls]
        self.overlapping = [n for n in range(1, len(kernels)) if kernels[n - 1] and kernels[n]]
        for n in self.overlapping:
            _, program, buffers, _ = call = self.calls[n]
            fresh = written_by(self.calls[n - 1:n], call)
            self.runtimes[n] = waiting_runtime(program, buffers[0].device, fresh, early_reads(self.calls, n))


class OverlappedGraph(CUDAGraph, Chain):
    """tinygrad's graph as a chain, in which a kernel overlaps with the one before it."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        for n in self.overlapping:
            edge = ctypes.byref(self.nodes[n - 1][0]), ctypes.byref(self.nodes[n][0])
            check(cuda.cuGraphRemoveDependencies(self.graph, *edge, 1))
            check(driver().cuGraphAddDependencies_v2(self.graph, *edge, PROGRAMMATIC, ctypes.c_size_t(1)))
        check(cuda.cuGraphExecDestroy(self.instance))
        self.instance = init_c_var(
            cuda.CUgraphExec, lambda x: check(cuda.cuGraphInstantiate_v2(ctypes.byref(x), self.graph, None, None, 0)))

    def new_node(self, bufs, write):
        """After the node before it, and no other."""
        return (cuda.CUgraphNode * 1)(self.nodes[-1][0]) if self.nodes else None, cuda.CUgraphNode()


def can_overlap(device: str) -> bool:
    """Whether a CUDA device and its driver (12.3 or later) know of it."""
    at = Device[device]
    return (at.graph in (CUDAGraph, OverlappedGraph) and int(at.arch.removeprefix("sm_").rstrip("af")) >= HOPPER
            and hasattr(driver(), "cuGraphAddDependencies_v2"))


def choose(device: str, early: bool) -> None:
    """Whether kernels of graphs that are captured on this CUDA device from now on overlap, where they can."""
    if can_overlap(device):
        Device[device].graph = OverlappedGraph if early else CUDAGraph
