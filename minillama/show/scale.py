"""Pictures of chapter 17: what a large model consists of and needs, what a machine allows, where the time goes."""
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, logarithmic
from minillama.show.steps import COLOURS
from minillama.units import in_units

STYLES = ((BLUE, ""), (ORANGE, "//"), (GREEN, ".."), (SKY, ""), (PURPLE, "xx"), (YELLOW, "\\\\"), (RED, "++"),
          ("#BBBBBB", ""), (BLUE, "oo"), (ORANGE, "--"))                    # colour, hatch
MORE = {"measured": ("#FFFFFF", ""), "launches": (RED, "xx")}
LINES = ((BLUE, "-", "o"), (ORANGE, "--", "s"), (GREEN, ":", "^"), (PURPLE, "-.", "D"))       # colour, line, marker


def stacked(rows: Mapping[str, Mapping[str, float]], title: str, unit: str, notes: Mapping[str, str] | None = None,
            shares: bool = False) -> Figure:
    """A bar a row, its parts one after the other in the order in which they first occur, parts of the model in the
    colours that they have in `steps`; the bar's total in `unit`, or its note, beside. With `shares`, every bar is as
    long as the others, in percent of its own total."""
    names = list(dict.fromkeys(name for parts in rows.values() for name in parts))
    figure, axes = canvas(title, 8, 1.5 + 0.45 * len(rows))
    for row, (label, parts) in enumerate(rows.items()):
        left, whole = 0.0, sum(parts.values())
        for place, name in enumerate(names):
            colour, hatch = MORE.get(name) or COLOURS.get(name) or STYLES[place % len(STYLES)]
            width = parts.get(name, 0.0) * (100 / whole if shares else 1)
            axes.barh(row, width, 0.62, left, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.4,
                      label=None if row else name)
            left += width
        axes.text(left, row, " " + (notes or {}).get(label, in_units(whole, unit).strip()), va="center", fontsize=9)
    axes.set(yticks=range(len(rows)), yticklabels=list(rows))
    if shares:
        axes.set(xlabel="% of the bar's total", xticks=range(0, 101, 20))
    else:
        axes.xaxis.set_major_formatter(lambda value, _: in_units(value, unit) if value else "0")
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=min(5, len(names)), fontsize=8)
    return figure


def memory(contexts: Sequence[int], needs: Mapping[str, Sequence[float]], cards: Mapping[str, float]) -> Figure:
    """Bytes that each format of the weights needs against the length of the text; the memory of cards as lines."""
    figure, axes = canvas("Memory for weights and one text", 8, 3.4)
    for (name, bytes), (colour, line, marker) in zip(needs.items(), LINES, strict=False):
        axes.plot(contexts, [amount / 1e9 for amount in bytes], line, color=colour, marker=marker, markersize=4,
                  label=name)
    for name, amount in cards.items():
        axes.axhline(amount / 1e9, color=BLACK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.text(contexts[-1] * 1.2, amount / 1e9, name, va="bottom", fontsize=8)
    axes.set(xlabel="tokens of text", ylabel="GB", ylim=(0, 1.06 * max(max(bytes) for bytes in needs.values()) / 1e9))
    logarithmic(axes, "x")
    axes.set_xlim(right=contexts[-1] * 2.2)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def against_batch(batches: Sequence[int], limits: Mapping[str, Sequence[float]],
                  points: Mapping[str, Mapping[int, float]]) -> Figure:
    """Tokens a second against the tokens of a batch: what each limit allows as a line, what ran as marks."""
    figure, axes = canvas("Tokens a second against the size of a batch", 8, 3.6)
    for (name, speeds), (colour, line, _) in zip(limits.items(), LINES, strict=False):
        axes.plot(batches, speeds, line, color=colour, label=name)
    for (name, found), (colour, _, marker) in zip(points.items(), reversed(LINES), strict=False):
        axes.plot(list(found), list(found.values()), marker, color=colour, markeredgecolor=BLACK, markersize=7,
                  label=name)
    axes.set(xlabel="tokens of a batch", ylabel="tokens a second")
    logarithmic(axes, "x", "y")
    axes.legend(fontsize=8, loc="upper left")
    return figure


def launches(states: Mapping[str, Mapping[str, float]], title: str) -> Figure:
    """Microseconds of one launch of each kernel, a bar for each state of the code; `states` in seconds."""
    names = list(dict.fromkeys(name for times in states.values() for name in times))
    figure, axes = canvas(title, 8, 1.2 + 0.36 * len(names))
    width = 0.8 / len(states)
    for n, ((state, times), (colour, hatch)) in enumerate(zip(states.items(), STYLES, strict=False)):
        rows = [row for row, name in enumerate(names) if name in times]
        axes.barh([row + (n + 0.5) * width - 0.4 for row in rows], [1e6 * times[names[row]] for row in rows], width,
                  color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.4, label=state)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="µs a launch")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8)
    return figure
