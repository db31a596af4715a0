"""Pictures of chapter 10: the kernels of a captured step, what each reads and writes, which of them must run again."""
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from tinygrad import Tensor, TinyJit
from tinygrad.engine.realize import get_call_arg_uops, get_call_outs_ins
from tinygrad.uop.ops import Ops, UOp

from minillama.measure import calls_of
from minillama.show import BLACK, BLUE, GREEN, ORANGE, RED, canvas

KINDS = {"every time": (GREEN, ""), "once": (ORANGE, "//"), "never": (RED, "xx")}


@dataclass(frozen=True)
class Kernel:
    """A kernel of a captured step, with the names of the buffers that it reads and writes."""
    name: str
    reads: frozenset[str]
    writes: frozenset[str]


def kernel(name: str, reads: str, writes: str) -> Kernel:
    """A kernel by hand: names of buffers with spaces between."""
    return Kernel(name, frozenset(reads.split()), frozenset(writes.split()))


def kernels_of(replay: TinyJit, inputs: Sequence[str], known: Mapping[str, Tensor]) -> list[Kernel]:
    """The kernels of a captured function in order. `inputs` names its tensor arguments, `known` other tensors; what it
    made itself is called t0, t1, ... (Capture it under `Context(NO_MEMORY_PLANNER=1)`: else one piece of memory serves
    several of those.)"""
    names: dict[UOp, str] = {tensor.uop.base: name for name, tensor in known.items()}

    def name(buffer: UOp) -> str:
        if buffer.op is Ops.PARAM:
            return inputs[buffer.arg.slot]
        made = sum(known.startswith("t") and known[1:].isdigit() for known in names.values())
        return names.setdefault(buffer.base, f"t{made}")
    found = []
    for call, read in zip(replay.captured.linear.src, calls_of(replay), strict=True):
        buffers, (outs, ins) = get_call_arg_uops(call), get_call_outs_ins(call)
        order = [name(buffer) for buffer in reversed(buffers)][::-1]
        found.append(Kernel(read.name, frozenset(order[i] for i in ins), frozenset(order[i] for i in outs)))
    return found


def table(kernels: Sequence[Kernel], kinds: Sequence[str] = (), results: Iterable[str] = (),
          labels: Sequence[str] = (), title: str = "Kernels, top to bottom, and the buffers they touch") -> Figure:
    """A row for each kernel, a column for each buffer: open circles are read, filled squares written. `kinds` tells
    how often each is needed, `results` are the buffers that somebody outside reads, `labels` say what kernels do."""
    columns = list(dict.fromkeys(name for k in kernels for name in (*sorted(k.reads), *sorted(k.writes))))
    width = 2.6 + min(0.75 * len(columns), 6.6)
    figure, axes = canvas(title, width=width, height=1.3 + 0.48 * len(kernels))
    names = [f"{label}\n{k.name}" for label, k in zip(labels, kernels, strict=True)] if labels else [
        k.name for k in kernels]
    axes.set(xlim=(-0.6, len(columns) - 0.4), ylim=(len(kernels) - 0.45, -0.55), xticks=range(len(columns)),
             yticks=range(len(kernels)), yticklabels=names)
    axes.set_xticklabels([f"{name}\n(result)" if name in set(results) else name for name in columns],
                         fontsize=9, rotation=30 if len(columns) > 11 else 0)
    axes.grid(axis="y", visible=False)
    for row, kernel in enumerate(kernels):
        if kinds:
            colour, hatch = KINDS[kinds[row]]
            axes.axhspan(row - 0.42, row + 0.42, facecolor=colour, alpha=0.3, hatch=hatch, edgecolor="white")
        axes.plot([columns.index(name) for name in kernel.reads], [row] * len(kernel.reads), "o", color=BLUE,
                  markerfacecolor="white", markersize=11, markeredgewidth=2)
        axes.plot([columns.index(name) for name in kernel.writes], [row] * len(kernel.writes), "s", color=BLACK,
                  markersize=7)
    handles = [Line2D([], [], marker="o", linestyle="", color=BLUE, markerfacecolor="white", label="reads"),
               Line2D([], [], marker="s", linestyle="", color=BLACK, label="writes")]
    handles += [Patch(facecolor=colour, alpha=0.4, hatch=hatch, label=f"needed {kind}")
                for kind, (colour, hatch) in KINDS.items() if kind in kinds]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, fontsize=8)
    return figure


def rows(rows_of: Mapping[str, Sequence[int]], tokens: int) -> Figure:
    """How many of a batch's rows each part of the model must compute, layer by layer: 1 or all, as bars."""
    figure, axes = canvas(f"Rows that must be computed, of {tokens}", width=7.0, height=0.9 + 0.4 * len(rows_of))
    for y, needed in enumerate(rows_of.values()):
        for x, count in enumerate(needed):
            axes.barh(y, 0.84 * count / tokens, 0.7, left=x, color=GREEN, edgecolor=BLACK, linewidth=0.4)
            axes.barh(y, 0.84 * (tokens - count) / tokens, 0.7, left=x + 0.84 * count / tokens, color=RED, alpha=0.35,
                      hatch="xx", edgecolor="white", linewidth=0.4)
    layers = max(map(len, rows_of.values()))
    axes.set(yticks=range(len(rows_of)), yticklabels=list(rows_of), xticks=[x + 0.42 for x in range(layers)],
             xticklabels=[str(x) for x in range(layers)], xlabel="layer (hatched: nobody reads the result)")
    axes.invert_yaxis()
    axes.grid(visible=False)
    return figure


def addresses(replay: TinyJit) -> int:
    """Arguments of a captured function's kernels that are inputs: addresses to be written into its graph at each
    replay. (Capture under `Context(JIT=2)`, which leaves the kernels one by one.)"""
    return sum(buffer.op is Ops.PARAM for call in replay.captured.linear.src for buffer in get_call_arg_uops(call))
