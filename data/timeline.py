"""Where the time of a token goes, kernel by kernel, while kernels overlap: times that they write down themselves.

    DEV=CUDA python data/timeline.py "a name for the state of the code"
    writes data/results/timeline-<model>-<device>.json, beside what it holds under other names

A profiler runs kernels one by one, and so sees nothing of what happens between them. Here each kernel of the captured
graph is compiled with marks in it, at which the first thread of each block reads the GPU's clock (it ticks every 32
ns): where the first block enters, where the first and the last are over their wait, and where the last ends. Random
weights, eight layers: six of the one kind and two of the other.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
from tinygrad import Context, Device, Tensor, dtypes
from tinygrad.uop.ops import UOp

from minillama.engine import Engine
from minillama.kernels import overlap
from minillama.measure import synchronize
from minillama.results import Model, Result, Row, beside_stored, write_result
from minillama.shapes import random_weights, shape_config

SHAPE, LAYERS, FORMAT = "qwen3-next-80b-a3b", 8, "Q4_0"
MARKS = {"enter": "Min", "release": "Min", "last_release": "Max", "end": "Max"}     # of all blocks, the first or last
MOST = 1024         # kernels of a graph
TOKENS, BEFORE = 24, 4      # tokens; those that are not counted
NEVER = 1 << 62


def mark(kind: str, address: int) -> str:
    """CUDA code: the first thread of a block notes the time."""
    return (f' if (threadIdx.x + threadIdx.y + threadIdx.z == 0) {{ unsigned long long t_; asm volatile("mov.u64 %0, '
            f'%globaltimer;" : "=l"(t_)); atomic{kind}((unsigned long long*){address:#x}ULL, t_); }}')


def marked(source: str, addresses: list[int]) -> str:
    """A kernel with the wait in it, and with marks."""
    enter, *released, end = (mark(kind, at) for kind, at in zip(MARKS.values(), addresses, strict=True))
    begin, last = overlap.SIGNATURE.search(source).end(), source.rindex("}")
    body = source[begin:last].replace(overlap.WAIT, overlap.WAIT + "".join(released), 1)
    return source[:begin] + enter + "\n" + body + end + "\n}"


@dataclass
class Log:
    """What kernels note: (kernels, marks), at an address that stays. `names`: of the kernels, in their order."""
    times: Tensor
    names: list[str]

    @classmethod
    def empty(cls) -> "Log":
        return cls(Tensor.zeros(MOST, len(MARKS), dtype=dtypes.uint64).contiguous().realize(), [])

    def runtime(self, program: UOp, device: str, fresh: frozenset[int], early: frozenset[int]):
        """Stands in for `overlap.waiting_runtime`."""
        first = self.times.uop.base.realized._buf.value + 8 * len(MARKS) * len(self.names)
        self.names.append(program.arg.name)
        source = overlap.with_wait(program, device, fresh, early)
        lib = Device[device].compiler.compile_cached(marked(source, [first + 8 * n for n in range(len(MARKS))]))
        return Device[device].runtime(replace(program.to_elf(), lib=lib))

    def clear(self) -> None:
        nothing = [NEVER if kind == "Min" else 0 for kind in MARKS.values()]
        self.times.assign(Tensor(np.tile(np.array(nothing, dtype=np.uint64), (MOST, 1)))).realize()
        synchronize()


def measured() -> tuple[list[str], np.ndarray]:
    """The names of a token's kernels but the first, and their times (tokens, kernels, marks) in nanoseconds."""
    log = Log.empty()
    overlap.waiting_runtime = log.runtime
    config = shape_config(SHAPE, LAYERS)
    with Context(JIT_BATCH_SIZE=0):         # all kernels in one graph
        engine, found = Engine(random_weights(config, FORMAT, True, True), config, context=2176), []
        for n in range(TOKENS):
            log.clear()
            engine.feed([n])
            synchronize()
            found.append(log.times.numpy()[:len(log.names)].astype(np.int64))
    return log.names, np.stack(found[BEFORE:])


def rows_of(name: str, kernels: list[str], times: np.ndarray) -> list[Row]:
    """A row for each kind of kernel: all times from the end of the kernel before it on, their medians."""
    found: dict[str, list[np.ndarray]] = defaultdict(list)
    for n in range(1, len(kernels)):
        found[kernels[n]].append(times[:, n] - times[:, n - 1, -1:])                    # (tokens, marks)
    return [Row(f"{name}: {kernel}", tokens=1, samples_ns=[round(median(one[:, -1].tolist())) for one in all_],
                values={what: float(np.median(np.concatenate(all_)[:, n])) for n, what in enumerate(MARKS)})
            for kernel, all_ in found.items()]


def main(name: str) -> None:
    rows = rows_of(name, *measured())
    model = Model(f"{SHAPE} {LAYERS} of {shape_config(SHAPE).layers} layers", FORMAT, LAYERS)
    result = beside_stored(Result.here("timeline", model, rows), lambda name: name.split(": ")[0])
    print("wrote", write_result(result, local=False))
    for row in rows:
        print(f"{row.name:<60}{len(row.samples_ns):>3}", *(f"{what} {row.values[what]:7.0f}" for what in MARKS))


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) == 2 else sys.exit(__doc__)
