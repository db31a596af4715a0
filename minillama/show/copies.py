"""Pictures of chapter 08: a captured graph with its copies marked, what falls as they go, and what others gained."""
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.pyplot import close, subplots
from tinygrad import Device, Tensor, TinyJit
from tinygrad.codegen import to_program
from tinygrad.engine.realize import get_call_arg_uops, get_call_outs_ins
from tinygrad.uop.ops import UOp

from minillama.kernels import rendering
from minillama.measure import Counts, calls_of
from minillama.results import SHIPPED, Result
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas
from minillama.show.sources import tidy
from minillama.units import in_units

# Speed before and after #19375, tokens a second: llama.cpp pull request 19375, by machine (both Q4_0).
PUBLISHED = {
    "M2 Ultra": {"pp1": (37.92, 51.99), "pp8": (137.75, 176.36), "pp512": (930.70, 1125.73),
                 "pp2048": (1049.91, 1352.31), "tg32": (38.02, 50.39)},
    "DGX Spark": {"pp512": (1055.58, 1161.67), "pp2048": (1059.00, 1324.66), "tg32": (43.11, 59.58)}}
# colour and marker
MACHINES = ((BLACK, "*"), (PURPLE, "P"), (BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (SKY, "v"), (RED, "D"),
            (BLACK, "X"))


# ---- a graph ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A kernel of a captured function: the buffers it writes and reads, whether it is a copy, and a word for it."""
    word: str
    copy: bool
    writes: frozenset[UOp]
    reads: frozenset[UOp]


def nodes_of(replay: TinyJit, why: Mapping[UOp, str], known: Mapping[str, Tensor]) -> list[Node]:
    """The kernels of a captured function in order. A kernel's word is what `why` says of the buffer that it writes, or
    of its reader's, if it is a copy; else the name of the first `known` tensor that it reads. (Capture under
    `Context(NO_MEMORY_PLANNER=1, JIT=2)`: else one piece of memory serves several results, or calls are gathered.)"""
    names, found = {tensor.uop.base: name for name, tensor in known.items()}, []
    for call, read in zip(replay.captured.linear.src, calls_of(replay), strict=True):
        buffers, (outs, ins) = [buffer.base for buffer in get_call_arg_uops(call)], get_call_outs_ins(call)
        word = next((why[buffers[i]] for i in outs if buffers[i] in why), "")
        word = word or next((names[buffers[i]] for i in ins if buffers[i] in names), "")
        found.append(Node(word, read.copy, frozenset(buffers[i] for i in outs), frozenset(buffers[i] for i in ins)))
    for place, node in reversed(list(enumerate(found))):
        if node.copy and not node.word:
            reader = next((other for other in found[place + 1:] if other.reads & node.writes), node)
            found[place] = replace(node, word=reader.word)
    return found


def graph(nodes: Sequence[Node], title: str) -> Figure:
    """Kernels as boxes, from left (what reads only inputs) to right; lines are buffers, hatched boxes are copies."""
    writer: dict[UOp, int] = {}
    edges, depth = [], []
    for place, node in enumerate(nodes):
        before = sorted({writer[buffer] for buffer in node.reads if buffer in writer})
        edges += [(other, place) for other in before]
        depth.append(max((depth[other] + 1 for other in before), default=0))
        writer |= {buffer: place for buffer in node.writes}
    for place in reversed(range(len(nodes))):           # a kernel stands right before the first that reads it
        readers = [depth[reader] for other, reader in edges if other == place]
        depth[place] = min(readers) - 1 if readers else depth[place]
    columns = [[place for place in range(len(nodes)) if depth[place] == x] for x in range(max(depth) + 1)]
    at: dict[int, tuple[float, float]] = {}
    for x, column in enumerate(columns):                # a kernel stands as high as what it reads, on average
        above = {place: [at[other][1] for other, reader in edges if reader == place] for place in column}
        ordered = sorted(column, key={place: -float(np.mean(ys or [0])) for place, ys in above.items()}.get)
        at |= {place: (x, (len(column) - 1) / 2 - y) for y, place in enumerate(ordered)}
    rows = max(map(len, columns))
    figure, axes = canvas(title, width=0.72 * len(columns) + 0.4, height=0.9 + 0.52 * rows)
    axes.axis("off")
    axes.set(xlim=(-0.55, len(columns) - 0.45), ylim=(-rows / 2, rows / 2))
    for start, end in edges:
        axes.add_patch(FancyArrowPatch(at[start], at[end], arrowstyle="-|>", mutation_scale=7, shrinkA=15, shrinkB=17,
                                       linewidth=0.8, color="#777777"))
    for place, node in enumerate(nodes):
        x, y = at[place]
        axes.add_patch(Rectangle((x - 0.42, y - 0.32), 0.84, 0.64, facecolor="#F3B99A" if node.copy else SKY,
                                 hatch="////" if node.copy else "", edgecolor=RED if node.copy else BLACK))
        axes.text(x, y, node.word.replace(" ", "\n"), ha="center", va="center", fontsize=7,
                  bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85} if node.copy else None)
    handles = [Patch(facecolor=SKY, edgecolor=BLACK, label="computes"),
               Patch(facecolor="#F3B99A", hatch="////", edgecolor=RED, label="copies")]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize=8)
    return figure


# ---- what falls ---------------------------------------------------------------------------------------------------


def falling(counts: Mapping[str, Counts], seconds: Mapping[str, float], title: str) -> Figure:
    """Kernels (copies hatched), bytes and time, row by row, as one kind of copy after the other is left out."""
    figure, panels = subplots(1, 3, sharey=True, figsize=(8.6, 0.9 + 0.27 * len(counts)))
    close(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    rows = range(len(counts))
    values = {"kernels (hatched: copies)": ([count.kernels for count in counts.values()], ""),
              "bytes": ([count.bytes for count in counts.values()], "B"),
              "time": ([seconds[name] for name in counts], "s")}
    for axes, (name, (lengths, unit)) in zip(panels, values.items(), strict=True):
        axes.barh(rows, lengths, 0.7, color=SKY)
        if not unit:
            copies = [count.copies for count in counts.values()]
            axes.barh(rows, copies, 0.7, color=RED, hatch="xxx", edgecolor="white")
        for row, length in enumerate(lengths):
            axes.text(length, row, f" {in_units(length, unit) if unit else length}", va="center", fontsize=8)
        axes.set_title(name, fontsize=9)
        axes.set_xlim(0, 1.32 * max(lengths))
        axes.grid(visible=False)
        axes.set_xticks([])
    panels[0].set(yticks=rows, yticklabels=list(counts))
    panels[0].invert_yaxis()
    return figure


def growth(chunks: Sequence[int], forms: Mapping[str, tuple[Sequence[float], Sequence[float]]], title: str) -> Figure:
    """Bytes against the number of chunks, for each form: counted (markers), and a formula for 1, 2, 3, ... (lines)."""
    figure, axes = canvas(title, height=3.0)
    for (name, (measured, formula)), (colour, marker, line) in zip(
            forms.items(), ((RED, "s", "--"), (BLUE, "o", "-")), strict=False):
        until = range(1, len(formula) + 1)
        axes.plot(until, np.array(formula) / 1e6, line, color=colour, label=f"{name}: the formula")
        axes.plot(chunks, np.array(measured) / 1e6, marker, color=colour, label=f"{name}: counted")
    axes.set(xlabel="chunks", ylabel="MB", xlim=(0, None), ylim=(0, None))
    axes.legend()
    return figure


def crossing(sizes: Sequence[int], lines: Mapping[str, Sequence[float]], title: str) -> Figure:
    """Seconds against a size, one line each, both axes logarithmic."""
    figure, axes = canvas(title, height=3.0)
    for (name, seconds), (colour, marker) in zip(lines.items(), ((RED, "s"), (BLUE, "o"), (GREEN, "^")), strict=False):
        axes.plot(sizes, np.array(seconds) * 1e3, marker + "-", color=colour, label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows and columns", ylabel="milliseconds")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.legend()
    return figure


# ---- what others gained -------------------------------------------------------------------------------------------


def stored_gains(results: Sequence[Result]) -> dict[str, dict[str, float]]:
    """Of stored runs of the copies ablation: how many times faster without, by machine (and model, where it is not the
    shipped one) and test.

    Of a machine's formats the first counts: Q4_0, as published, where it was run.
    """
    found = {}
    for result in results:
        took = {row.name: float(np.median(row.samples_ns)) for row in result.rows}
        model = "" if result.model.name == SHIPPED else f", {result.model.name}"
        found.setdefault(f"minillama, {result.device.name} ({result.device.backend}){model}", {
            name.split()[1]: took[name.replace("none", "everywhere")] / time
            for name, time in took.items() if name.startswith("none ")})
    return found


def gains(by_machine: Mapping[str, Mapping[str, float]], tests: Sequence[str], title: str) -> Figure:
    """How many times faster each test runs without copies, a marker for each machine."""
    figure, axes = canvas(title, width=7.6, height=3.4)
    axes.axvline(1, color=BLACK, linewidth=0.8)
    for (name, gain), (colour, marker) in zip(by_machine.items(), cycle(MACHINES), strict=False):
        rows = [row for row, test in enumerate(tests) if test in gain]
        axes.plot([gain[tests[row]] for row in rows], rows, marker, color=colour, markersize=8, label=name,
                  markerfacecolor="none" if marker in "os^vD" else colour)
    axes.set(yticks=range(len(tests)), yticklabels=tests, xlabel="times as fast without the copies",
             ylim=(len(tests) - 0.6, -0.4))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    return figure


# ---- a kernel's source --------------------------------------------------------------------------------------------


def source(form: Callable[[Tensor], Tensor], *shape: int, backend: str = "") -> str:
    """The last kernel of `form(x)`, x of that shape: as this device gets it, or as METAL, CUDA or CL would."""
    device = backend or Device.DEFAULT
    kernel = form(Tensor.empty(*shape, device=device)).schedule_linear().src[-1].src[0]
    renderer = rendering.renderer(backend) if backend else Device[device].renderer
    return tidy(to_program(kernel, renderer).src[2].arg, {0: "out", 1: "x", 2: "norms"})
