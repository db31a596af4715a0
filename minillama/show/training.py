"""Pictures of appendix A2: the loop of training, what each loss compares, a router that learns, a run's log and speed.

`parts_of` reads a captured training step: which of its kernels run the model, which the gradients, which the update.
"""
import ast
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.pyplot import close, subplots
from tinygrad import Tensor, TinyJit
from tinygrad.engine.realize import get_call_arg_uops, get_call_outs_ins

from minillama.results import Row
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, logarithmic
from minillama.show.experts import label

LINES = ((BLUE, "-"), (ORANGE, "--"), (GREEN, ":"), (RED, "-."), (PURPLE, "-"))
AREAS = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (SKY, "xx"), (PURPLE, "\\\\"), (RED, "++"))
BOXES = {"text": (0, 0, SKY), "batch": (1, 0, SKY), "layers": (2, 0, GREEN), "logits": (3, 0, GREEN),
         "losses": (4, 0, ORANGE), "gradients": (4, 1, ORANGE), "update": (3, 1, ORANGE), "weights": (2, 1, BLUE),
         "a GGUF file": (1, 1, PURPLE), "the engine": (0, 1, PURPLE)}
ARROWS = (("text", "batch"), ("batch", "layers"), ("layers", "logits"), ("logits", "losses"), ("losses", "gradients"),
          ("gradients", "update"), ("update", "weights"), ("weights", "layers"), ("weights", "a GGUF file"),
          ("a GGUF file", "the engine"))


def cycle() -> Figure:
    """One step of training as a loop, and the way out of it: weights that are written to a file and served."""
    figure, axes = canvas("A step of training, and the way out of the loop", 8, 2.6)
    axes.axis("off")
    axes.set(xlim=(-0.55, 4.55), ylim=(1.5, -0.5))
    for name, (x, y, colour) in BOXES.items():
        axes.add_patch(FancyBboxPatch((x - 0.33, y - 0.22), 0.66, 0.44, boxstyle="round,pad=0.03", facecolor=colour,
                                      alpha=0.35, edgecolor=BLACK, linewidth=1))
        axes.text(x, y, name, ha="center", va="center")
    for start, end in ARROWS:
        (x0, y0, _), (x1, y1, _) = BOXES[start], BOXES[end]
        reach = 0.39 if y0 == y1 else 0.27      # from the middle of a box to its edge
        length = max(abs(x1 - x0), abs(y1 - y0))
        dx, dy = reach * (x1 - x0) / length, reach * (y1 - y0) / length
        axes.add_patch(FancyArrowPatch((x0 + dx, y0 + dy), (x1 - dx, y1 - dy), arrowstyle="-|>", mutation_scale=12))
    return figure


def targets(names: Sequence[str], length: int) -> Figure:
    """What each loss reads and what it must guess, at the places of a window of tokens: `length` of them, and those
    past the end that only serve as targets."""
    def short(name: str) -> str:
        return label(name) if len(name) < 7 else label(name)[:5] + "…"
    figure, axes = canvas("At each place (across): the token that must be guessed there", 9.5, 2.5)
    rows = {"the text": (0, SKY), "model: next token": (1, BLUE), "block: the one after": (2, ORANGE),
            "block, second step": (3, GREEN)}
    for y, (ahead, colour) in enumerate(rows.values()):
        for x in range(len(names) if not ahead else length):
            axes.add_patch(FancyBboxPatch((x - 0.4, y - 0.32), 0.8, 0.64, boxstyle="round,pad=0.02", facecolor=colour,
                                          alpha=0.35 if ahead or x < length else 0.12, edgecolor="none"))
            axes.text(x, y, short(names[x + ahead]), ha="center", va="center", fontsize=7)
    axes.axvline(length - 0.5, color=BLACK, linestyle=":", linewidth=1)
    axes.set(xlim=(-0.6, len(names) - 0.4), ylim=(3.5, -0.5), yticks=range(4), yticklabels=list(rows), xticks=[])
    axes.grid(visible=False)
    return figure


def curves(x: Sequence[float], lines: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, title: str,
           marks: Mapping[str, float] | None = None) -> Figure:
    """Several quantities over one axis; `marks` are horizontal lines with names."""
    figure, axes = canvas(title, 7, 3)
    for (name, values), (colour, style) in zip(lines.items(), LINES, strict=False):
        axes.plot(x, values, style, color=colour, label=name, marker="o" if len(x) < 10 else None, markersize=5)
    for name, value in (marks or {}).items():
        axes.axhline(value, color=BLACK, linestyle=":", linewidth=1)
        axes.annotate(name, (x[-1], value), xytext=(0, 3), textcoords="offset points", ha="right", fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend(fontsize=8)
    return figure


def shares(panels: Mapping[str, np.ndarray]) -> Figure:
    """The share of all choices that each expert gets, step by step: a panel a run, (steps, experts) that sum to 1."""
    figure, all_axes = subplots(1, len(panels), sharey=True, figsize=(8, 2.8), squeeze=False)
    close(figure)
    for axes, (title, grid) in zip(all_axes[0], panels.items(), strict=True):
        areas = axes.stackplot(range(len(grid)), grid.T, alpha=0.75, edgecolor="white", linewidth=0.5,
                               labels=[f"expert {i}" for i in range(grid.shape[1])])
        for area, (colour, hatch) in zip(areas, AREAS, strict=False):
            area.set(facecolor=colour, hatch=hatch)
        axes.set(title=title, xlabel="step", xlim=(0, len(grid) - 1), ylim=(0, 1))
    all_axes[0, 0].set_ylabel("share of the choices")
    figure.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


def singular_values(spectra: Mapping[str, Sequence[float]]) -> Figure:
    """Singular values of matrices, largest first."""
    figure, axes = canvas("Singular values, largest first", 6, 2.6)
    for (name, values), (colour, _), marker in zip(spectra.items(), LINES, "os^Dv", strict=False):
        axes.plot(range(1, len(values) + 1), values, marker + "-", color=colour, label=name, markersize=4)
    logarithmic(axes, "y")
    axes.set(xlabel="place", ylabel="singular value")
    axes.legend(fontsize=8)
    return figure


# ---- a captured step ----------------------------------------------------------------------------------------------


def parts_of(step: TinyJit, losses: Tensor, kept: Iterable[Tensor]) -> list[str]:
    """Of each kernel of a captured training step, in order: "forward" if the losses depend on it, "update" if it
    writes one of the tensors that are `kept` between steps, else "backward". (Capture under
    `Context(NO_MEMORY_PLANNER=1, JIT=2)`: else one piece of memory serves several tensors.)"""
    state, calls = {tensor.uop.base for tensor in kept}, step.captured.linear.src
    writer: dict = {}
    sources, updates = [], []
    for index, call in enumerate(calls):
        buffers, (outs, ins) = [uop.base for uop in get_call_arg_uops(call)], get_call_outs_ins(call)
        sources.append({writer[buffers[i]] for i in ins if buffers[i] in writer})
        updates.append(any(buffers[i] in state for i in outs))
        writer |= {buffers[i]: index for i in outs}
    needed, queue = set(), [writer[losses.uop.base]]
    while queue:
        if (index := queue.pop()) not in needed:
            needed.add(index)
            queue += sources[index]
    return ["forward" if index in needed else "update" if update else "backward"
            for index, update in enumerate(updates)]


# ---- the shipped run ----------------------------------------------------------------------------------------------


def read_log(path: str | Path) -> tuple[list[dict], list[dict]]:
    """A run's log: lines of training, and lines of evaluation on held-out text."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "heldout" in line]


def run(steps: Sequence[dict], heldout: Sequence[dict], uniform: float) -> Figure:
    """A log as `read_log` gives it: the losses in nats a token, with a uniform guess, and the learning rate."""
    figure, (above, below) = subplots(2, 1, sharex=True, figsize=(8, 4.2), height_ratios=(3, 1))
    close(figure)
    tokens = [line["tokens"] / 1e6 for line in steps]
    names = {"loss": "next token", "first": "first draft", "second": "second draft"}
    for (key, name), (colour, style) in zip(names.items(), LINES, strict=False):
        above.plot(tokens, [line[key] for line in steps], style, color=colour, label=name)
    last = steps[-1]["tokens"]
    above.plot([line.get("tokens", line["step"] * last / steps[-1]["step"]) / 1e6 for line in heldout],
               [line["heldout"]["nats_per_token"] for line in heldout], "D", color=RED, markersize=5,
               label="next token, held-out text")
    above.axhline(uniform, color=BLACK, linestyle=":", linewidth=1)
    above.annotate("a uniform guess", (tokens[-1], uniform), xytext=(0, -11), textcoords="offset points", ha="right",
                   fontsize=8)
    logarithmic(above, "y")
    above.set(ylabel="nats a token", title="The shipped model's run")
    above.legend(fontsize=8)
    below.plot(tokens, [line["lr"] for line in steps], color=BLACK)
    below.set(ylabel="rate / peak", xlabel="million tokens seen", ylim=(0, 1.1))
    return figure


def speeds(rows: Sequence[Row]) -> Figure:
    """Tokens a second of the rows of a result of kind "training"."""
    figure, axes = canvas("Training the shipped model on one GPU", 8, 1.1 + 0.42 * len(rows))
    for place, row in enumerate(rows):
        speed = row.values["tokens_per_second"]
        colour, hatch = (BLUE, "//") if row.name.startswith("tinygrad") else (GREEN, "")
        axes.barh(place, speed / 1e3, 0.66, color=colour, hatch=hatch, edgecolor="white")
        axes.text(speed / 1e3, place, f" {speed:,.0f}", va="center", fontsize=9)
    axes.set(yticks=range(len(rows)), xlabel="thousand tokens a second")
    axes.set_yticklabels([row.name.replace(", ", ",\n", 1) for row in rows], fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def source_in(path: str | Path, name: str) -> Markdown:
    """A function of a file that need not be importable here, as it stands there today."""
    text = Path(path).read_text(encoding="utf-8")
    found = next(node for node in ast.parse(text).body if getattr(node, "name", None) == name)
    return Markdown(f"```python\n{ast.get_source_segment(text, found)}\n```")
