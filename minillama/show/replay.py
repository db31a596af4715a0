"""Pictures of chapter 09: tokens that were built, captured or replayed; timelines; what a device's own graph says."""
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillama.show import BLACK, BLUE, GREEN, ORANGE, RED, SKY, canvas, logarithmic
from minillama.units import in_units

KINDS = {"built": (ORANGE, "//"), "captured": (RED, "xx"), "replayed": (GREEN, "")}
BARS = ((ORANGE, "//"), (SKY, ""))       # of two tracks; where there are more, they are alike


def tokens(rows: Mapping[str, Sequence[tuple[str, float]]], title: str) -> Figure:
    """A row for each way of running, a box for each token: built, captured or replayed, and the time that it took."""
    longest = max(map(len, rows.values()))
    figure, axes = canvas(title, width=2.4 + 0.52 * longest, height=1.2 + 0.42 * len(rows))
    axes.set(xlim=(-0.5, longest - 0.5), ylim=(len(rows) - 0.5, -0.5), yticks=range(len(rows)), yticklabels=list(rows),
             xticks=range(longest), xticklabels=range(1, longest + 1), xlabel="token")
    axes.grid(visible=False)
    for row, values in enumerate(rows.values()):
        for column, (kind, seconds) in enumerate(values):
            colour, hatch = KINDS[kind]
            axes.add_patch(Rectangle((column - 0.46, row - 0.4), 0.92, 0.8, facecolor=colour, alpha=0.4, hatch=hatch,
                                     edgecolor="white"))
            axes.text(column, row, in_units(seconds, "s").replace(" ", "\n"), ha="center", va="center", fontsize=6.5,
                      bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8})
    seen = [kind for kind in KINDS if any(kind == found for values in rows.values() for found, _ in values)]
    handles = [Patch(facecolor=KINDS[kind][0], alpha=0.5, hatch=KINDS[kind][1], label=kind) for kind in seen]
    figure.legend(handles=handles, loc="outside lower left", ncols=3, fontsize=8)
    return figure


def cumulative(lines: Mapping[str, tuple[float, float]], most: int) -> Figure:
    """Time until so many tokens are there: for each way the seconds of the first one and of each further one."""
    figure, axes = canvas("Time until so many tokens are there", height=3.0)
    count = np.arange(1, most + 1)
    for (name, (first, further)), (colour, marker) in zip(lines.items(), ((RED, "s"), (BLUE, "o")), strict=False):
        axes.plot(count, first + (count - 1) * further, marker + "-", color=colour, label=name, markersize=4)
    logarithmic(axes, "y")
    axes.set(xlabel="tokens", ylabel="seconds")
    axes.legend()
    return figure


def timeline(plans: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], title: str) -> Figure:
    """Plans one above the other on one scale of time; a plan's tracks are named and hold (start, end) in seconds."""
    names = list(dict.fromkeys(track for tracks in plans.values() for track in tracks))
    count = sum(map(len, plans.values()))
    figure, axes = canvas(title, width=8.2, height=1.2 + 0.27 * count + 0.2 * len(plans))
    row, ticks, labels, last = 0.0, [], [], max(
        end for tracks in plans.values() for spans in tracks.values() for _, end in spans)
    for plan, tracks in plans.items():
        finish = max(end for spans in tracks.values() for _, end in spans)
        for place, (name, spans) in enumerate(tracks.items()):
            colour, hatch = BARS[names.index(name)] if len(names) <= len(BARS) else (SKY, "")
            for start, end in spans:
                axes.barh(row, end - start, 0.8, start, color=colour, hatch=hatch, edgecolor="white", linewidth=0.4)
            ticks.append(row)
            labels.append(f"{plan}: {name}" if place == 0 else name)
            row += 1
        axes.plot([finish, finish], [row - len(tracks) - 0.5, row - 0.5], color=BLACK, linewidth=1.5)
        axes.text(finish + 0.01 * last, row - len(tracks) / 2 - 0.5, in_units(finish, "s"), va="center", fontsize=8)
        row += 0.5
    axes.set(yticks=ticks, yticklabels=labels, ylim=(row - 0.5, -0.6), xlim=(0, 1.12 * last))
    axes.xaxis.set_major_formatter(lambda value, _: in_units(value, "s") if value else "0")
    axes.grid(axis="y", visible=False)
    return figure


def lanes(starts: Sequence[float], seconds: Sequence[float]) -> dict[str, list[tuple[float, float]]]:
    """Kernels that start at given times, as tracks of a timeline: each in the first lane that is free."""
    found: list[list[tuple[float, float]]] = []
    for start, took in sorted(zip(starts, seconds, strict=True)):
        free = next((lane for lane in found if lane[-1][1] <= start + 1e-12), None)
        if free is None:
            found.append(free := [])
        free.append((start, start + took))
    return {f"lane {number + 1}": lane for number, lane in enumerate(found)}


def lines_of(module: str, *words: str) -> str:
    """The lines of a module of tinygrad in which one of the words stands, as they are, with their numbers. The module
    is read, not imported: it may be for a device that is not here."""
    package = importlib.util.find_spec("tinygrad").origin
    path = Path(package).parent / f"{module}.py"
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
    found = [(number, line.strip()) for number, line in lines if any(word in line for word in words)]
    return "\n".join(f"{number:4}  {line:.108}" for number, line in found)
