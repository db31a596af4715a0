"""Pictures of a step: its kernels one by one, the bytes they move, and how both fall from rung to rung of the ladder.

A `Step` is a list of calls as `measure.calls_of` reads them, with the seconds and the part of the model of each where
these are known; `captured_step` makes one of an engine's step, with everything.
"""
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.pyplot import close, subplots
from tinygrad import Context, Tensor

from minillama.engine import Engine
from minillama.ladder import LADDER
from minillama.marks import Marks
from minillama.measure import Call, Counts, seconds_of_calls
from minillama.results import Result, Row
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, logarithmic
from minillama.units import in_units

GREY = "#BBBBBB"
COLOURS = {     # colour, hatch
    "kernel": (SKY, ""), "copy": (RED, "xxxx"), "embedding": (BLACK, ""), "norm": (GREY, ""),
    "MTP input": (PURPLE, "////"), "projections": (BLUE, ""), "convolution": (SKY, ""), "delta rule": (ORANGE, ""),
    "attention": (YELLOW, ""), "output projection": (BLUE, "////"), "router": (PURPLE, ""),
    "shared expert": (GREEN, "////"), "experts": (GREEN, ""), "head": (GREY, "////")}
OTHERS = ((PURPLE, "++"), (SKY, "oo"), (YELLOW, "||"), (GREEN, "--"))       # for names of your own
MACHINES = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "^"), (PURPLE, "D"))        # colour, marker
UNITS = {"bytes": "B", "seconds": "s", "kernels": ""}


@dataclass(frozen=True)
class Step:
    """The calls of a step in order; `seconds` and `parts`, where they are not empty, give the time and the part of the
    model of each call."""
    calls: Sequence[Call]
    seconds: Sequence[float] = ()
    parts: Sequence[str] = ()

    def widths(self, by: str) -> list[float]:
        """Of each call: its bytes, its seconds, or 1 ("kernels")."""
        if by == "bytes":
            return [float(call.bytes) for call in self.calls]
        if by == "seconds" and len(self.seconds) != len(self.calls):
            raise ValueError("this step was not timed call by call: use captured_step or seconds_of_calls")
        return list(self.seconds) if by == "seconds" else [1.0] * len(self.calls)

    def kinds(self, colour: str) -> list[str]:
        """Of each call: its part of the model ("part"), or whether it is a copy ("copy")."""
        if colour == "part" and len(self.parts) != len(self.calls):
            raise ValueError("the parts of this step's calls are not known: use captured_step")
        return list(self.parts) if colour == "part" else ["copy" if call.copy else "kernel" for call in self.calls]

    def total(self) -> str:
        """The step in words."""
        counts = Counts.of(list(self.calls))
        time = f", {in_units(sum(self.seconds), 's')}" if self.seconds else ""
        return (f"{counts.kernels:,} kernel{'s' * (counts.kernels != 1)}, of these {counts.copies:,} copies; "
                f"{in_units(counts.bytes, 'B')}{time}")


def captured_step(engine: Engine, tokens: int = 1, kind: str = "logits", repeats: int = 3) -> Step:
    """A captured step of the engine at its present position, each call timed and put to its part of the model.

    Calls stay apart even where the device would replay them as a batch. The engine forgets its text.
    """
    start, config, weights = engine.position, engine.config, engine.weights
    ids = Tensor([1] * tokens, dtype="int32", device=engine.device).realize()
    with Context(JIT=2):
        engine.steps.pop((kind, tokens), None)      # captured before, it may have been gathered into batches
        seconds = seconds_of_calls(lambda: engine.step(kind, ids, start, tokens), repeats=repeats)
    replay = engine.steps.pop((kind, tokens))
    if not hasattr(replay, "captured"):
        raise ValueError("an eager step has nothing to read: use engine.with_recipe(capture='jit')")
    marks = Marks(config, tokens, start).ends(weights.embed, weights.head)
    marks.weight("norm", "norm", weights.out_norm)
    for layer, state in zip(weights.layers, engine.state.layers, strict=True):
        marks.layer(layer, state)
    calls, parts = zip(*marks.named(replay), strict=True)
    engine.clear()
    return Step(calls, seconds, parts)


def _style(name: str, others: list[str]) -> tuple[str, str]:
    """Colour and hatch of a part; names that are none of the model's get what is left."""
    if name in COLOURS:
        return COLOURS[name]
    if name not in others:
        others.append(name)
    return OTHERS[others.index(name) % len(OTHERS)]


def _legend(axes: Axes, names: list[str], others: list[str]) -> None:
    handles = []
    for name in names:
        colour, hatch = _style(name, others)
        handles.append(Patch(facecolor=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5, label=name))
    columns = 5 if len(handles) > 4 else 4
    axes.figure.legend(handles=handles, loc="outside lower left", ncols=columns, fontsize=8)


def kernels(steps: dict[str, Step], by: str = "bytes", colour: str = "copy", title: str = "") -> Figure:
    """Every call of every step as a bar, in order, the steps one above the other on one scale.

    A bar's width is its bytes or its seconds (`by`; "kernels" makes all alike), its colour tells copies from what
    computes, or the parts of the model apart (`colour`: "copy" or "part"; then a red line marks the copies).
    """
    figure, axes = subplots(len(steps), 1, sharex=True, squeeze=False, figsize=(8, 1.0 + 0.95 * len(steps)))
    close(figure)
    figure.suptitle(title or f"A step, kernel by kernel: width is {by}", x=0.01, ha="left", fontsize=11)
    seen, others = [], []
    thin = max(sum(step.widths(by)) for step in steps.values()) / 300          # so narrow: no room for an edge
    for (name, step), place in zip(steps.items(), axes[:, 0], strict=True):
        left = 0.0
        for call, width, kind in zip(step.calls, step.widths(by), step.kinds(colour), strict=True):
            fill, hatch = _style(kind, others)
            place.barh(0, width, 0.8, left, color=fill, hatch=hatch, edgecolor="white",
                       linewidth=0.4 if width > thin else 0)
            if colour == "part" and call.copy:
                place.plot([left, left + width], [-0.52, -0.52], color=RED, linewidth=2.5, solid_capstyle="butt")
            seen += [kind] if kind not in seen else []
            left += width
        place.set_title(f"{name}: {step.total()}", fontsize=9)
        place.set(yticks=[], ylim=(-0.62, 0.5))
        place.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("kernels" if by == "kernels" else f"{by}, one kernel after the other")
    axes[-1, 0].xaxis.set_major_formatter(lambda value, _: in_units(value, UNITS[by]) if value else "0")
    order = list(COLOURS)
    _legend(axes[-1, 0], sorted(seen, key=lambda name: order.index(name) if name in order else len(order)), others)
    return figure


def bytes_moved(steps: dict[str, Step], colour: str = "copy", by: str = "bytes", title: str = "") -> Figure:
    """Bytes (or seconds, or kernels) of each step as one bar, stacked by what moves them, totals beside: before and
    after."""
    figure, axes = subplots(figsize=(8, 1.3 + 0.45 * len(steps)))
    close(figure)
    axes.set_title(title or {"bytes": "Bytes moved", "seconds": "Time", "kernels": "Kernels"}[by])
    others: list[str] = []
    totals = {name: _sums(step, by, colour) for name, step in steps.items()}
    names = [name for name in COLOURS if any(name in sums for sums in totals.values())]
    names += [name for sums in totals.values() for name in sums if name not in names]
    names = list(dict.fromkeys(names))
    for row, sums in enumerate(totals.values()):
        left = 0.0
        for name in names:
            fill, hatch = _style(name, others)
            axes.barh(row, sums.get(name, 0.0), 0.65, left, color=fill, hatch=hatch, edgecolor=BLACK, linewidth=0.4)
            left += sums.get(name, 0.0)
        axes.text(left, row, f" {in_units(left, UNITS[by]).strip()}", va="center", fontsize=9)
    axes.set(yticks=range(len(steps)), yticklabels=list(steps), xlabel=by)
    axes.xaxis.set_major_formatter(lambda value, _: in_units(value, UNITS[by]) if value else "0")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    _legend(axes, names, others)
    return figure


def _sums(step: Step, by: str, colour: str) -> dict[str, float]:
    sums: dict[str, float] = {}
    for kind, width in zip(step.kinds(colour), step.widths(by), strict=True):
        sums[kind] = sums.get(kind, 0.0) + width
    return sums


# ---- the ladder ---------------------------------------------------------------------------------------------------


def rows_of(result: Result, kind: str) -> dict[str, Row]:
    """The rows of a ladder's prompts ("pp") or generation ("tg"), by rung, in the ladder's order."""
    split = [row.name.rpartition(" ") for row in result.rows]
    return {rung: row for (rung, _, test), row in zip(split, result.rows, strict=True) if test.startswith(kind)}


def of_all(results: Sequence[Result], kind: str) -> dict[str, Row]:
    """Every rung that any ladder has, in the ladder's order; where several have it, as the longest counted it."""
    found: dict[str, Row] = {}
    for rows in sorted((rows_of(result, kind) for result in results), key=len):
        found |= rows
    order = {rung.name: place for place, rung in enumerate(LADDER)}
    return {name: found[name] for name in sorted(found, key=lambda name: order.get(name, len(order)))}


def microseconds(row: Row) -> tuple[float, float]:
    """Of one token: building and running together, and running alone (as its own clock had it)."""
    whole = median(row.samples_ns) / row.tokens / 1e3
    alone = row.clocks.run / row.tokens / 1e3 if row.recipe.get("capture") == "eager" and row.clocks else whole
    return whole, alone


def waterfall(results: list[Result], kind: str = "tg", so_far: str | None = None, title: str = "") -> Figure:
    """The ladder of stored results: kernels, bytes and time of one token, rung by rung, from the top down.

    Kernels and bytes are those of the longest ladder, copies hatched; time is drawn for every machine: filled,
    building and running; open, running alone. `so_far` names the rung that the course has reached: those below are
    pale. Rows that are no rungs ("naive, captured", to compare running with running) come last, under a line.
    """
    if not results:
        raise ValueError("no ladder is stored: `make ladder` measures one")
    rows = of_all(results, kind)
    names = list(rows)
    if so_far is not None and so_far not in names:
        raise ValueError(f"{so_far!r} is not among the rungs {names}")
    reached = names.index(so_far) if so_far else len(names)
    alphas = [1.0 if place <= reached or ", " in name else 0.3 for place, name in enumerate(names)]
    size = 9, 1.5 + 0.28 * len(names)
    figure, panels = subplots(1, 3, sharey=True, figsize=size, width_ratios=(1, 1, 1.5))
    close(figure)
    what = {"tg": "generated", "pp": "prompt"}[kind]
    title = title or f"The ladder, one {what} token of {results[0].model.name}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    _bars(panels[0], [row.counts.kernels / row.tokens for row in rows.values()], alphas,
          [row.counts.copies / row.tokens for row in rows.values()])
    panels[0].set_title("kernels (hatched: copies)", fontsize=9)
    _bars(panels[1], [row.counts.bytes / row.tokens / 1e6 for row in rows.values()], alphas)
    panels[1].set_title("MB moved", fontsize=9)
    for result, (colour, marker) in zip(results, cycle(MACHINES), strict=False):
        _times(panels[2], result, names, kind, alphas, colour, marker)
    logarithmic(panels[2], "x")
    panels[2].set_title("µs (filled: all of it, open: running alone)", fontsize=9)
    panels[2].legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.3, -0.1), ncols=1)
    for axes in panels[:any(", " in name for name in names) * 3]:
        axes.axhline(sum(", " not in name for name in names) - 0.5, color=BLACK, linewidth=0.8)
    panels[0].set(yticks=range(len(names)), yticklabels=names)
    panels[0].invert_yaxis()
    return figure


def _bars(axes: Axes, lengths: list[float], alphas: list[float], hatched: Sequence[float] = ()) -> None:
    for place, (length, alpha) in enumerate(zip(lengths, alphas, strict=True)):
        axes.barh(place, length, 0.7, color=SKY, alpha=alpha)
        if hatched:
            axes.barh(place, hatched[place], 0.7, color=RED, hatch="xxx", edgecolor="white", alpha=alpha)
        axes.text(length, place, f" {length:,.0f}" if length >= 10 else f" {length:.1f}", va="center", fontsize=8,
                  alpha=max(alpha, 0.5))
    axes.set_xlim(0, 1.25 * max(lengths))
    axes.grid(axis="y", visible=False)


def _times(axes: Axes, result: Result, names: list[str], kind: str, alphas: list[float], colour: str,
           marker: str) -> None:
    rows = rows_of(result, kind)
    for place, (name, alpha) in enumerate(zip(names, alphas, strict=True)):
        if name not in rows:
            continue
        whole, alone = microseconds(rows[name])
        axes.plot([alone, whole], [place, place], color=colour, linewidth=1, alpha=alpha)
        axes.plot(whole, place, marker, color=colour, alpha=alpha, markersize=6,
                  label=f"{result.device.name} ({result.device.backend})" if place == 0 else None)
        axes.plot(alone, place, marker, color=colour, alpha=alpha, markersize=6,
                  markerfacecolor="white" if alone < whole else colour)


def tokens_a_second(result: Result, kind: str = "tg") -> dict[str, float]:
    """Tokens a second of every rung, building included where a rung builds every time."""
    return {name: 1e6 / microseconds(row)[0] for name, row in rows_of(result, kind).items()}


def longest(step: Step, count: int = 5, by: str = "bytes") -> list[tuple[str, float]]:
    """The calls that move or take most, as (name, bytes or seconds): where to look first."""
    widths = step.widths(by)
    return [(step.calls[int(i)].name, widths[int(i)]) for i in np.argsort(widths)[::-1][:count]]
