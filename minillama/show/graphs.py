"""Pictures of chapter 02: a tensor's graph, what a view reads, what a replay gives back, and a cache that grows."""
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Patch, Rectangle
from matplotlib.pyplot import close, subplots
from tinygrad import Tensor
from tinygrad.uop.ops import GroupOp, Ops, UOp

from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, logarithmic

HIDDEN = {Ops.CONST, Ops.STACK}     # numbers and shapes: they would hide the rest
KINDS = {"memory": (ORANGE, ""), "view": (SKY, "//"), "arithmetic": (GREEN, ""), "sum or maximum": (PURPLE, "xx")}


def _kind(node: UOp) -> str:
    if node.op in (Ops.BUFFER, Ops.STORE, Ops.AFTER, Ops.CONTIGUOUS):
        return "memory"
    return "view" if node.op in GroupOp.Movement else "sum or maximum" if node.op is Ops.REDUCE else "arithmetic"


def graph(tensor: Tensor, title: str = "What the tensor remembers") -> Figure:
    """The graph behind a tensor, from its buffers (left) to itself (right): operations, with the shapes they give.

    Constants and shape arguments are left out.
    """
    nodes = [node for node in tensor.uop.toposort() if node.op not in HIDDEN and node.dtype.name != "weakint"]
    depth: dict[UOp, int] = {}
    for node in nodes:
        depth[node] = max((depth[source] + 1 for source in node.src if source in depth), default=0)
    for node in reversed(nodes):            # a source stands right before the first that reads it
        readers = [depth[other] for other in nodes if node in other.src]
        depth[node] = min(readers) - 1 if readers else depth[node]
    columns = [[node for node in nodes if depth[node] == place] for place in range(max(depth.values()) + 1)]
    at = {node: (x, (len(column) - 1) / 2 - y) for x, column in enumerate(columns) for y, node in enumerate(column)}
    rows = max(map(len, columns))
    figure, axes = canvas(title, width=max(5.0, 1.12 * len(columns)), height=1.0 + 0.85 * rows)
    axes.axis("off")
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(-rows / 2, rows / 2))
    for node in nodes:
        for source in node.src:
            if source in at:
                axes.add_patch(FancyArrowPatch(at[source], at[node], arrowstyle="-|>", mutation_scale=9,
                                               shrinkA=24, shrinkB=27, linewidth=0.9))
        x, y = at[node]
        colour, hatch = KINDS[_kind(node)]
        axes.add_patch(Rectangle((x - 0.43, y - 0.3), 0.86, 0.6, facecolor=colour, alpha=0.4, edgecolor=BLACK))
        shape = "×".join(map(str, node.shape)) if node.op is not Ops.STORE else ""
        axes.text(x, y, f"{node.op.name}\n{shape}", ha="center", va="center", fontsize=7.5)
    seen = [kind for kind in KINDS if kind in map(_kind, nodes)]
    handles = [Patch(facecolor=KINDS[kind][0], alpha=0.4, edgecolor=BLACK, label=kind) for kind in seen]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8)
    return figure


def views(panels: Mapping[str, np.ndarray]) -> Figure:
    """Views of one buffer as grids: in each place the address from which it is read, shaded from first to last."""
    ratios = [0.4 + grid.shape[1] for grid in panels.values()]
    figure, all_axes = subplots(1, len(panels), figsize=(0.5 * sum(ratios), 2.5), squeeze=False, width_ratios=ratios)
    close(figure)
    last, rows = (max(int(measure(grid)) for grid in panels.values()) for measure in (np.max, len))
    for axes, (name, grid) in zip(all_axes[0], panels.items(), strict=True):
        axes.imshow(grid, cmap="cividis_r", vmin=-1, vmax=1.6 * last)
        for (row, column), address in np.ndenumerate(grid):
            axes.text(column, row, str(address), ha="center", va="center", fontsize=9,
                      color="white" if address > 0.6 * last else "black")
        axes.set_title(f"{name}\n{grid.shape[0]} × {grid.shape[1]}", fontsize=9)
        axes.set(ylim=(rows - 0.5, -0.5))
        axes.axis("off")
    return figure


def replays(wanted: Sequence[float], got: Mapping[str, Sequence[float]]) -> Figure:
    """What several forms of a captured function give, call by call, beside what they should; wrong ones are marked."""
    title = "Call by call: captured at the second, replayed from the third"
    figure, axes = canvas(title, height=0.9 + 0.42 * len(got))
    axes.set(xlim=(-0.5, len(wanted) - 0.5), ylim=(len(got) - 0.5, -0.5), yticks=range(len(got)),
             yticklabels=list(got), xticks=range(len(wanted)))
    axes.set_xticklabels([f"call {i + 1}\nshould be {value:g}" for i, value in enumerate(wanted)], fontsize=8)
    axes.grid(visible=False)
    for row, values in enumerate(got.values()):
        for column, (value, right) in enumerate(zip(values, wanted, strict=True)):
            wrong = value != right
            axes.add_patch(Rectangle((column - 0.46, row - 0.42), 0.92, 0.84, facecolor=RED if wrong else GREEN,
                                     alpha=0.4, hatch="xx" if wrong else "", edgecolor="white"))
            axes.text(column, row, f"{value:g}", ha="center", va="center",
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5, "alpha": 0.8})
    return figure


def growth(rows: Sequence[int], forms: Mapping[str, Sequence[float]]) -> Figure:
    """Bytes moved to store so many rows one after the other, for several ways of storing them."""
    figure, axes = canvas("Bytes moved until so many rows are stored", height=3.2)
    styles = ((RED, "s", "--"), (BLUE, "o", "-"))
    for (name, moved), (colour, marker, line) in zip(forms.items(), styles, strict=False):
        axes.plot(rows, np.array(moved) / 1e6, marker + line, color=colour, label=name)
    logarithmic(axes, "x", "y")
    axes.set(xlabel="rows", ylabel="MB")
    axes.legend()
    return figure
