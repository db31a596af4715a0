"""Pictures of chapter 15: a ring of memories over several rounds, what slots occupy beside what snapshots copy, and
speeds where every draft is rejected."""
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.pyplot import close, subplots

from minillama.show import BLACK, BLUE, GREEN, ORANGE, RED, SKY, canvas

KINDS = {"where the round began": (SKY, ""), "kept": (GREEN, "//"), "chosen: the next round begins here": (ORANGE, ""),
         "rejected": (RED, "xx"), "left over": ("white", "")}
LOOKS = ((SKY, ""), (ORANGE, "//"), (GREEN, ".."))


def kind_of(held: int, start: int, end: int, last: int) -> str:
    """What a slot is after a round from position `start` to `end` that wrote memories up to `last`."""
    if held == end:
        return "chosen: the next round begins here"
    if held == start:
        return "where the round began"
    return "left over" if held < start or held > last else "kept" if held < end else "rejected"


def rounds(table: Sequence[tuple[int, int, Sequence[int | None]]], drafts: int) -> Figure:
    """A ring after each round: a row a round, (position before, position after, position whose memory each slot
    holds, None for none); in a box stands how many tokens its memory has read."""
    slots, seen = len(table[0][2]), set()
    figure, axes = canvas(f"A ring of {slots} slots, {drafts} drafts a round; numbers: tokens that a memory has read",
                          8.4, 1.1 + 0.5 * len(table))
    for row, (start, end, held) in enumerate(table):
        for slot, position in enumerate(held):
            text, kind = ("", "left over") if position is None else (
                f"{position}", kind_of(position, start, end, start + drafts + 1))
            colour, hatch = KINDS[kind]
            seen.add(kind)
            thick = 2.4 if kind.startswith("chosen") else 0.8
            axes.add_patch(Rectangle((slot + 0.06, row + 0.1), 0.88, 0.8, facecolor=colour, hatch=hatch, alpha=0.6,
                                     edgecolor=BLACK, linewidth=thick))
            axes.text(slot + 0.5, row + 0.5, text, ha="center", va="center",
                      bbox=dict(boxstyle="round,pad=0.15", facecolor="white", edgecolor="none", alpha=0.85))
        axes.text(-0.15, row + 0.5, f"round {row + 1}: {end - start - 1} of {drafts} kept", ha="right", va="center")
    for slot in range(slots):
        axes.text(slot + 0.5, -0.15, f"slot {slot}", ha="center", va="bottom", fontsize=9)
    axes.set(xlim=(-2.1, slots + 2.9), ylim=(len(table) + 0.05, -0.6))
    axes.axis("off")
    axes.legend(handles=[Patch(facecolor=colour, hatch=hatch, alpha=0.6, edgecolor=BLACK, label=name)
                         for name, (colour, hatch) in KINDS.items() if name in seen], loc="center right", fontsize=8)
    return figure


def costs(drafts: Sequence[int], occupied: Mapping[str, Sequence[float]],
          copied: Mapping[str, Sequence[float]]) -> Figure:
    """Against the number of drafts, in megabytes: left, what lies on the device all the time; right, what each round
    copies. Values in bytes."""
    figure, panels = subplots(1, 2, figsize=(8.4, 2.9))
    close(figure)
    titles = ("MB that lie there", "MB that a round copies")
    for axes, lines, title in zip(panels, (occupied, copied), titles, strict=True):
        for place, ((name, values), (colour, hatch)) in enumerate(zip(lines.items(), LOOKS, strict=False)):
            across = [n + (place - (len(lines) - 1) / 2) * 0.8 / len(lines) for n in drafts]
            axes.bar(across, [value / 1e6 for value in values], 0.8 / len(lines), color=colour, hatch=hatch,
                     edgecolor=BLACK, linewidth=0.6, label=name)
        axes.set_title(title, fontsize=10)
        axes.set(xticks=list(drafts), xlabel="drafts a round")
        axes.set_ylim(top=axes.get_ylim()[1] * 1.35)
        axes.legend(fontsize=8, loc="upper left")
    return figure


def speeds(engines: Mapping[str, Mapping[int, float]], title: str) -> Figure:
    """Tokens a second of several engines by number of drafts (0: none), as bars with their share of plain decoding."""
    figure, axes = canvas(title, 7.6, 3.0)
    counts = sorted({count for values in engines.values() for count in values})
    for place, ((name, values), (colour, hatch)) in enumerate(zip(engines.items(), LOOKS, strict=False)):
        for count, speed in values.items():
            x = counts.index(count) + (place - (len(engines) - 1) / 2) * 0.8 / len(engines)
            axes.bar(x, speed, 0.8 / len(engines), color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.6,
                     label=name if count == min(values) else None)
            axes.text(x, speed, f"{speed:.0f}" + (f"\n({speed / values[0]:.0%})" if count else ""), ha="center",
                      va="bottom", fontsize=8, color=BLUE if count else BLACK)
    axes.set(xticks=range(len(counts)), ylabel="tokens a second",
             xticklabels=["no drafts"] + [f"{count} draft{'s' * (count > 1)}" for count in counts[1:]])
    axes.set_ylim(top=axes.get_ylim()[1] * 1.12)
    axes.legend()
    return figure
