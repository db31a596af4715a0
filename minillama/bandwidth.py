"""How fast packed weights are read: every kernel for few tokens, on a model's real shapes, beside a measured copy.

A sample is the replay of a graph of many launches, each after the one before (all write to the same place, as the
captured graph's memory plan has it), overlapping where the device can do that: "apart" is the time without. They go
round over more copies of the weights than any cache holds.
Counted are the bytes of the weights that a launch must read, once, as a file has them; what a launch costs is in its
time, and the row "launch" tells how much that is: a matrix of 4 KB.

`DEV=CUDA python -m minillama.bandwidth` measures and keeps the result; `--store` keeps it among the project's own.
"""
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import numpy as np
from tinygrad import Context, Device, Tensor, TinyJit, dtypes

from minillama.config import ModelConfig
from minillama.kernels import product, tuning
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.packed import Packed
from minillama.measure import time_call
from minillama.results import Model, Result, Row, write_result
from minillama.roofline import copy_bandwidth
from minillama.shapes import hashed, random_packed, shape_config

SHAPE = "qwen3-next-80b-a3b"
FORMATS = ("Q4_0", "Q8_0", "F16", "Q5_0", "Q4_K", "Q5_K", "Q6_K")
SEVERAL = ("Q4_0", "Q8_0", "Q4_K")      # the formats that are measured with several tokens too
DRAFTS = (2, 4, 8)                      # tokens
LAUNCHES = 200                          # of a sample, at least
GRAPH = 64                              # of a graph, at least, replayed again without waiting
CACHE = 400e6                           # bytes of copies that no cache holds: an H100's has 50 MB
MOST = 400                              # copies of one matrix
REPEATS = 9


@dataclass(frozen=True)
class Case:
    """A kernel to measure: `bytes` that a launch has to read; `calls` make it anew, each over another copy."""
    name: str
    tokens: int
    bytes: int
    calls: list[Callable[[], Tensor]]


class Cases:
    """The kernels of one model's shapes; `cache`: bytes to go round over."""

    def __init__(self, config: ModelConfig, cache: float = CACHE):
        self.config, self.cache, self.fill = config, cache, hashed()

    def matrices(self, format: str, *shape: int) -> list[Packed]:
        """A random matrix (or stack) and copies of it, each in a place of its own: together as much as `cache`."""
        first = random_packed(format, shape, shape[-1] ** -0.5, self.fill)
        count = min(max(2, math.ceil(self.cache / first.nbytes())), MOST)
        more = [Packed(format, shape, tuple(array.clone() for array in first.arrays)) for _ in range(1, count)]
        Tensor.realize(*(array for weight in more for array in weight.arrays))
        return [first, *more]

    def values(self, *shape: int) -> Tensor:
        return self.fill(shape, -1.0, 1.0, dtypes.float32)

    def linear(self, format: str, rows: int, columns: int, tokens: int = 1, name: str = "linear") -> Case:
        weights, x = self.matrices(format, rows, columns), self.values(tokens, columns)
        return Case(f"{name} {format} {rows}x{columns}", tokens, weights[0].file_bytes,
                    [lambda w=w: product.linear(x, w) for w in weights])

    def shared(self, format: str, tokens: int = 1) -> Case:
        rows, columns = self.config.shared_width, self.config.hidden
        weights = iter(self.matrices(format, rows, columns))
        pairs = list(zip(weights, weights, strict=False))
        x, share = self.values(tokens, columns), self.values(columns)
        return Case(f"shared gate+up {format} 2x{rows}x{columns}", tokens, 2 * pairs[0][0].file_bytes,
                    [lambda p=p: product.shared_gated(x, *p, share)[0] for p in pairs])

    def chosen(self, tokens: int) -> list[Tensor]:
        """Choices of experts, (tokens, used) each; none is chosen again before all have been."""
        experts, used = self.config.experts, self.config.experts_used
        order, most = np.random.default_rng(0).permutation(experts).astype(np.int32), min(tokens * used, experts)
        return [Tensor(np.resize(order[n:n + most], (tokens, used))).realize()
                for n in range(0, experts - most + 1, most)]

    def experts(self, format: str, tokens: int = 1) -> Iterator[Case]:
        """Both halves of the chosen experts' networks, from stacks of all experts."""
        c, ids = self.config, self.chosen(tokens)
        parts, of = min(tokens * c.experts_used, c.experts) / c.experts, f"{c.experts_used} of {c.experts}"
        x, share = self.values(tokens, c.hidden), self.values(tokens, c.experts_used)
        routed = self.values(tokens, c.experts_used, c.expert_width)
        weights = iter(self.matrices(format, c.experts, c.expert_width, c.hidden))
        pairs = list(zip(weights, weights, strict=False))
        yield Case(f"experts gate+up {format} {of} 2x{c.expert_width}x{c.hidden}", tokens,
                   round(2 * pairs[0][0].file_bytes * parts),
                   [lambda p=p, i=i: product.gated(x, *p, i, share) for p in pairs for i in ids])
        weights = self.matrices(format, c.experts, c.hidden, c.expert_width)
        yield Case(f"experts down {format} {of} {c.hidden}x{c.expert_width}", tokens,
                   round(weights[0].file_bytes * parts),
                   [lambda w=w, i=i: product.mixed(routed, w, i) for w in weights for i in ids])

    def all(self) -> Iterator[Case]:
        """Formats whose blocks do not divide the rows are left out."""
        c = self.config
        inputs = c.conv_channels + c.value_width + 2 * c.v_heads            # rows that read the hidden state, stacked
        yield self.linear("F32", 32, 32, name="launch")
        known = [f for f in FORMATS if all(size % LAYOUTS[f].block == 0 for size in (c.hidden, c.expert_width))]
        for format in known:
            yield self.linear(format, inputs, c.hidden)
            yield self.linear(format, c.hidden, c.value_width)
            yield from self.experts(format)
        if "Q6_K" in known:
            yield self.linear("Q6_K", c.vocab, c.hidden, name="head")
        yield self.linear("F32", c.experts, c.hidden, name="router")
        for format in (f for f in SEVERAL if f in known):
            yield self.shared(format)
            for tokens in DRAFTS:
                yield self.linear(format, inputs, c.hidden, tokens)
                yield from self.experts(format, tokens)


def captured(case: Case, launches: int) -> TinyJit:
    """One graph of so many launches, captured."""
    def run() -> None:
        for n in range(launches):
            case.calls[n % len(case.calls)]().realize()
    replay = TinyJit(run)
    replay.cnt = 1      # capture at the first call
    with Context(JIT_BATCH_SIZE=0):                     # in one graph
        replay()
    return replay


def measure_case(case: Case, copy: float, launches: int = LAUNCHES, repeats: int = REPEATS, early: bool = True) -> Row:
    """Samples are nanoseconds a launch; `copy` is the copy's bandwidth, bytes a second; `early`: launches overlap
    where the device can do that."""
    once = max(len(case.calls), min(launches, GRAPH))
    with tuning.launches(None, early):
        times, replay = math.ceil(launches / once), captured(case, once)
    timing = time_call(lambda: [replay() for _ in range(times)] and None, repeats=repeats, warmup=1)
    samples = [round(sample / (once * times)) for sample in timing.samples_ns]
    speed = case.bytes / (median(samples) * 1e-9)
    values = {"launches": once * times, "gigabytes_a_second": speed / 1e9, "share_of_copy": speed / copy}
    return Row(case.name, tokens=case.tokens, samples_ns=samples, values={"bytes": case.bytes} | values)


def line(row: Row) -> str:
    """A row for people."""
    return (f"{row.name:<48}{row.tokens:>3}{row.values['bytes'] / 1e6:>9.2f} MB{median(row.samples_ns) / 1e3:>9.2f} µs"
            f"{row.values['gigabytes_a_second']:>8.0f} GB/s{100 * row.values['share_of_copy']:>6.0f} %"
            + (f"{apart / 1e3:>9.2f} µs apart" if (apart := row.values.get("nanoseconds_apart")) else ""))


def main() -> None:
    config, copy = shape_config(SHAPE), copy_bandwidth()
    rows = [Row("copy", values={"gigabytes_a_second": copy / 1e9, "share_of_copy": 1.0})]
    print(f"{Device.DEFAULT}: a copy reads and writes {copy / 1e9:,.0f} GB/s", flush=True)
    for case in Cases(config).all():
        rows.append(measure_case(case, copy))
        if Device.DEFAULT.startswith("CUDA"):       # elsewhere none overlaps
            apart = median(measure_case(case, copy, early=False).samples_ns)
            rows[-1].values |= {"early": 1, "nanoseconds_apart": apart}
        print(line(rows[-1]), flush=True)
        write_result(Result.here("bandwidth", Model(config.name, "all", 1), rows), local="--store" not in sys.argv)


if __name__ == "__main__":
    main()
