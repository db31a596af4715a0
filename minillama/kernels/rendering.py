"""Kernels for devices that are not here: their source as tinygrad would render it, never compiled."""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

from tinygrad import Context, Device, Tensor
from tinygrad.codegen import to_program
from tinygrad.codegen.opt import tc
from tinygrad.device import Compiler
from tinygrad.helpers import Target
from tinygrad.renderer.cstyle import ClangRenderer, CStyleLanguage, CUDARenderer, MetalRenderer, OpenCLRenderer
from tinygrad.uop.ops import Ops

from minillama.kernels import tuning

LANGUAGES = {"METAL": (MetalRenderer, "Apple9"), "CUDA": (CUDARenderer, "sm_90"), "CL": (OpenCLRenderer, ""),
             "CPU": (ClangRenderer, "x86_64")}
UNITS = {"METAL": tc.metal, "CUDA": tc.get_cuda("sm_90")}       # tensor cores


class Keeper(Compiler):
    """Stands in for a compiler that is not here: what it makes of a source is that source."""

    def __init__(self, *_, **__):
        super().__init__(None)

    def compile(self, src: str) -> bytes:
        return src.encode()


def renderer(backend: str) -> CStyleLanguage:
    """Writes Metal, CUDA, OpenCL or C; the compiler behind it is a stand-in."""
    language, arch = LANGUAGES[backend]
    made = object.__new__(language)         # whose own __init__ would ask for the device's compiler
    CStyleLanguage.__init__(made, Target(backend, arch=arch, interface="rendered"))     # unlike any real one
    made.compiler = Keeper()
    made.tensor_cores = UNITS.get(backend, [])
    return made


@contextmanager
def acting_as(backend: str) -> Iterator[CStyleLanguage]:
    """Within it the NULL device gets the kernels of another backend (a key of LANGUAGES, else KeyError), which need
    not be here: what they do can be counted and their source read, as the renderer that it yields writes it."""
    device, made = Device["NULL"], renderer(backend)
    device._select_renderer = lambda: made      # tinygrad 0.14 asks here, each time
    tuning.acting["NULL"] = backend
    tuning.has_tensor_cores.cache_clear()
    try:
        with Context(PARALLEL=0):       # helpers would look for the real compiler
            yield made
    finally:
        del device._select_renderer, tuning.acting["NULL"]
        tuning.has_tensor_cores.cache_clear()


@dataclass(frozen=True)
class Program:
    """A rendered kernel: its source, and how many blocks of how many threads run it."""
    source: str
    blocks: int
    threads: int


def programs(result: Tensor) -> list[Program]:
    """The hand-written kernels behind a tensor that nobody has realized, in order, for the device on which its buffers
    claim to be: make them with `Tensor.empty(..., device="METAL")`, and no device is asked."""
    calls = [node for node in result.uop.toposort() if node.op is Ops.CALL and node.src[0].op is Ops.SINK]
    made = [to_program(call.src[0], renderer(result.device)) for call in calls]
    return [Program(one.src[2].arg, prod(one.arg.global_size), prod(one.arg.local_size)) for one in made]


def sources(result: Tensor) -> list[str]:
    """The sources alone."""
    return [program.source for program in programs(result)]
