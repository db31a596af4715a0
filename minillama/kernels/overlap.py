"""CUDA graphs whose kernels start before the one before them has ended ("programmatic dependent launch").

A token's kernels run for a few microseconds each; launching one, fetching its first weights and draining its last
threads costs as much again. NVIDIA's GPUs from Hopper on can start a kernel once all blocks of its predecessor run. It
may then load, early, whatever that predecessor does not write (weights, states), and has to *wait*
(`griddepcontrol.wait`) before it loads the rest.

The captured graph knows what each kernel writes. So each kernel is compiled once more: early loads first, then the
wait, then all else. The kernels form a chain, and each releases its successor only after its own wait: when a kernel
starts, all kernels but its predecessor have ended.

PTX guarantees that writes of earlier kernels are visible only behind the wait. Where an early load's address depends
on such a number (an expert that was chosen two kernels ago), the number is read through the L2 cache (`__ldcg`).

Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, `griddepcontrol`.
"""
import ctypes
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from math import prod

from tinygrad import Device
from tinygrad.device import Buffer
from tinygrad.engine.jit import MultiGraphRunner
from tinygrad.renderer.cstyle import CUDARenderer
from tinygrad.runtime.autogen import cuda
from tinygrad.runtime.graph.cuda import CUDAGraph
from tinygrad.runtime.ops_cuda import check
from tinygrad.runtime.support.c import init_c_var
from tinygrad.uop.ops import Ops, UOp

WAIT = '  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");'
AGAIN = '  asm volatile("griddepcontrol.wait;" ::: "memory");'
PROGRAMMATIC = (ctypes.c_ubyte * 8)(1, 0, 1)    # a CUgraphEdgeData: from which port, to which, of which type
HOPPER = 90                                     # its compute capability, times ten
LINE = 128                                      # bytes of a cache line: what one read may bring along
RECENT = 16     # calls: what the last ones wrote lies in the cache; to read it early would only take registers
SHARE = 6       # blocks a multiprocessor, at most, for early reads: of more, most start when there is no wait left
# Early reads, at most, where some are looked up by others (an H200, sums over experts: with 83 of them 5.1 instead of
# 6.9 µs, with 103 10 to 22 instead of 6)
MOST = 96

REGISTERS, PLENTY = 65536, 150  # of a multiprocessor; of a thread, from which on early reads fit beside the rest

BOUNDS = re.compile(r"__launch_bounds__\((\d+)\)")
SIGNATURE = re.compile(r'extern "C" __global__[^{]*? \w+\(([^{]*)\) \{\n')
DECLARED = re.compile(r"  [a-z_][\w ]*? (\w+) = ")      # "  unsigned char val3 = ...;"
ROOM = re.compile(r"  \w[\w ()]* \w+\[\d+\];")         # "  __shared__ __align__(16) float buf0[512];"
READ = re.compile(r"(  \w+ \w+ = )\(\*(\(.*\))\);$")        # "  int4 val0 = (*((int4*)((data2_10+4))));"


def words(line: str) -> set[str]:
    return set(re.findall(r"\w+", line))


def hoisted(lines: list[str], arrays: set[str], fresh: set[str], early: set[str]) -> tuple[dict[int, str], list[int]]:
    """Of a kernel's straight beginning, by number, the lines that read arguments `early` at addresses that depend on
    no argument `fresh`, and the lines that these addresses are made of. (Of many reads whose addresses are read, too,
    only what they look up: with all of them, later blocks wait twice, and registers spill.) Then, if some of those
    reads must wait: these lines, and before them all other reads of that beginning."""
    declared, reads, late, others, tainted = {}, [], [], [], set(fresh)
    for n, line in enumerate(lines):
        if not (match := DECLARED.match(line)):
            if not ROOM.match(line):
                break
            continue
        declared[match[1]] = n
        if words(line) & early:
            (late if words(line) & tainted else reads).append(n)
        elif words(line) & arrays:
            others.append(n)
        if words(line) & tainted:
            tainted.add(match[1])

    def with_addresses(reads: list[int]) -> set[int]:
        found, todo = set(), list(reads)
        while todo:
            if (n := todo.pop()) not in found:
                found.add(n)
                todo += [declared[word] for word in words(lines[n].split("=", 1)[1]) if word in declared]
        return found
    first, second = with_addresses(reads), with_addresses(late)
    found = [n for n in first if words(lines[n]) & arrays]
    looked_up = {DECLARED.match(lines[n])[1] for n in found}
    chained = {n for n in first if looked_up & words(lines[n].split("=", 1)[1])}
    numbers = [n for n in found if not words(lines[n]) & early]
    if not all(READ.match(lines[n]) for n in numbers):
        first, numbers = set(), []
    elif len(found) > MOST and chained:
        behind, known = set(), set()
        for n in sorted(first):
            if n in chained or words(lines[n].split("=", 1)[1]) & known:
                behind.add(n)
                known.add(DECLARED.match(lines[n])[1])
        first, second = first - behind, second | behind
    shared = {n: READ.sub(r"\1__ldcg(\2);", lines[n]) for n in numbers}
    soon = sorted(with_addresses(others) - first) if second - first else []
    return {n: shared.get(n, lines[n]) for n in sorted(first)}, soon + sorted(second - first - set(soon))


def waiting(source: str, fresh: frozenset[int], early: frozenset[int] = frozenset(), share: int = 0) -> str:
    """A kernel's CUDA source with the wait in it: before it reads of the arguments `early`, where no address depends
    on the arguments `fresh` (both by position), behind it all else, and of that reads first, where some are such.
    These end in a wait, too, which is over at once: the compiler moves nothing across it, and would ask for them late.

    `share`: blocks that a multiprocessor gets where they are spread evenly. If they can have registers in plenty, the
    compiler is told: early reads need them, but not so many that blocks are left over for a second turn.
    """
    signature, bounds = SIGNATURE.search(source), BOUNDS.search(source)
    head, lines = source[:signature.end()], source[signature.end():].split("\n")
    arrays = [part.split()[-1] for part in signature[1].split(", ") if "*" in part]
    first, second = hoisted(lines, set(arrays), {arrays[i] for i in fresh}, {arrays[i] for i in early})
    if first and share and REGISTERS // (share * int(bounds[1])) >= PLENTY:
        head = head.replace(bounds[0], f"__launch_bounds__({bounds[1]}, {share})")
    rest = [line for n, line in enumerate(lines) if n not in first and n not in second]
    behind = [*(lines[n] for n in second), AGAIN] if second else []
    return head + "\n".join([*first.values(), WAIT, *behind, *rest])


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
    """How many blocks run a kernel, at most."""
    return prod(int(size.vmax) if isinstance(size, UOp) else size for size in program.arg.global_size)


def early_reads(calls: list[Call], n: int) -> frozenset[int]:
    """The positions of call n's arguments that are worth reading before it waits."""
    return frozenset(range(len(calls[n][2]))) - written_by(calls[max(0, n - RECENT):n], calls[n])


@cache
def multiprocessors(device: str) -> int:
    count = ctypes.c_int()
    check(cuda.cuDeviceGetAttribute(ctypes.byref(count), cuda.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT,
                                    Device[device].cu_device))
    return count.value


def with_wait(program: UOp, device: str, fresh: frozenset[int], early: frozenset[int]) -> str:
    """The program's source with the wait in it."""
    share = -(-blocks_of(program) // multiprocessors(device))
    return waiting(program.src[2].arg, fresh, *((early, share) if share <= SHARE else ()))


@cache
def waiting_runtime(program: UOp, device: str, fresh: frozenset[int], early: frozenset[int]):
    """The program with the wait in it, compiled and loaded."""
    lib = Device[device].compiler.compile_cached(with_wait(program, device, fresh, early))
    return Device[device].runtime(replace(program.to_elf(), lib=lib))


class Chain(MultiGraphRunner):
    """Stands between tinygrad's graph and its base: by then the calls are known, and no node is made yet."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        on = [call[2][0].device if call[1].op is Ops.PROGRAM else "" for call in self.calls]
        self.overlapping = [n for n in range(1, len(on)) if on[n] and on[n] == on[n - 1]]
        for n in self.overlapping:
            given = frozenset(place for place, _ in self.uop_replace[n])        # other buffers in every replay
            fresh = written_by(self.calls[n - 1:n], self.calls[n]) | given
            self.runtimes[n] = waiting_runtime(self.calls[n][1], on[n], fresh, early_reads(self.calls, n) - given)


class OverlappedGraph(CUDAGraph, Chain):
    """tinygrad's graph as a chain, in which a kernel overlaps with the one before it."""

    def __init__(self, linear: UOp, input_uops: tuple[UOp, ...] = ()):
        super().__init__(linear, input_uops)
        for n in self.overlapping:
            edge = ctypes.byref(self.nodes[n - 1][0]), ctypes.byref(self.nodes[n][0])
            check(cuda.cuGraphRemoveDependencies(self.graph, *edge, 1))
            check(cuda.dll.cuGraphAddDependencies_v2(self.graph, *edge, PROGRAMMATIC, ctypes.c_size_t(1)))
        plain, self.instance = self.instance, init_c_var(
            cuda.CUgraphExec, lambda x: check(cuda.cuGraphInstantiate_v2(ctypes.byref(x), self.graph, None, None, 0)))
        check(cuda.cuGraphExecDestroy(plain))

    def new_node(self, bufs, write):
        """After the node before it, and no other."""
        return (cuda.CUgraphNode * 1)(self.nodes[-1][0]) if self.nodes else None, cuda.CUgraphNode()


def can_overlap(device: str) -> bool:
    """Whether a CUDA device, its driver (12.3 or later) and its compiler, which must be CUDA's, know of it."""
    at = Device[device]
    if at.graph is not CUDAGraph or not isinstance(at.renderer, CUDARenderer):
        return False
    return (int(at.renderer.target.arch.removeprefix("sm_").rstrip("af")) >= HOPPER
            and hasattr(cuda.dll, "cuGraphAddDependencies_v2"))


@contextmanager
def launches(device: str, early: bool) -> Iterator[None]:
    """Within it kernels of graphs that are captured on this CUDA device overlap, if `early` and where they can."""
    at = Device[device]
    before, at.graph = at.graph, OverlappedGraph if early and can_overlap(device) else at.graph
    try:
        yield
    finally:
        at.graph = before
