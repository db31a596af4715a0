"""Pictures of chapter 14: what the MTP block reads, what it guesses, which guesses stay, and when that pays."""
from collections.abc import Mapping, Sequence
from statistics import median

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

from minillama.config import ModelConfig
from minillama.results import Result
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas

KINDS = {"draft, kept": (GREEN, ""), "draft, rejected": (RED, "xxx"), "the model's own": (SKY, "//")}


def _box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, hatch: str = "") -> None:
    axes.add_patch(Rectangle((x + 0.04, y + 0.12), width - 0.08, 0.76, facecolor=colour, alpha=0.45, hatch=hatch,
                             edgecolor=BLACK, linewidth=0.7, snap=True))
    axes.text(x + width / 2, y + 0.5, text, ha="center", va="center", fontsize=8,
              bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1} if hatch and text else None)


def _legend(axes: Axes, kinds: Mapping[str, tuple[str, str]]) -> None:
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour, alpha=0.45, hatch=hatch, edgecolor=BLACK, linewidth=0.7)
               for colour, hatch in kinds.values()]
    axes.figure.legend(handles, list(kinds), loc="outside lower left", ncols=4, fontsize=8)


def block(config: ModelConfig) -> Figure:
    """The MTP block at position p, from its two inputs to the logits, with the width of what flows."""
    figure, axes = canvas("The MTP block at position p", 8.2, 1.9)
    axes.axis("off")
    axes.set(xlim=(-0.1, 11.6), ylim=(-0.2, 2.3))
    wide = config.hidden
    _box(axes, 0, 1.2, 2.2, f"embedding of\ntoken p + 1 ({wide})", YELLOW)
    _box(axes, 0, 0, 2.2, f"hidden state of\nposition p ({wide})", SKY)
    for y in (1.2, 0):
        _box(axes, 2.6, y, 0.9, "norm", "#BBBBBB")
        axes.add_patch(FancyArrowPatch((2.18, y + 0.5), (2.66, y + 0.5), arrowstyle="->", mutation_scale=9))
        axes.add_patch(FancyArrowPatch((3.45, y + 0.5), (4.0, 1.1), arrowstyle="->", mutation_scale=9))
    parts = ((f"eh_proj\n{2 * wide} → {wide}", PURPLE, 1.6), ("attention,\nexperts", ORANGE, 1.6),
             ("norm", "#BBBBBB", 0.9), (f"head\n{wide} → {config.vocab}", GREEN, 1.5))
    x = 4.0
    for text, colour, width in parts:
        _box(axes, x, 0.6, width, text, colour)
        axes.add_patch(FancyArrowPatch((x + width - 0.03, 1.1), (x + width + 0.4, 1.1), arrowstyle="->",
                                       mutation_scale=9))
        x += width + 0.35
    axes.text(x + 0.08, 1.1, "a guess of\ntoken p + 2", va="center", fontsize=8)
    return figure


def guesses(read: Sequence[str], said: Sequence[str], guessed: Sequence[str]) -> Figure:
    """A strip a row: what was read last, what the model says next, and what the block had guessed a token earlier."""
    figure, axes = canvas("What the block guessed, one token before the model spoke", 8.6, 2.0)
    rows = {"token read": read, "the model says next": said, "the block had guessed": guessed}
    for y, pieces in enumerate(rows.values()):
        for x, piece in enumerate(pieces):
            colour, hatch = ("white", "") if y == 0 else KINDS["the model's own"] if y == 1 else (
                KINDS["draft, kept"] if piece == said[x] else KINDS["draft, rejected"])
            _box(axes, x, y, 1, repr(piece)[1:-1][:8], colour, "" if y == 1 else hatch)
    axes.set(xlim=(0, len(read)), ylim=(3, 0), xticks=(), yticks=[0.5, 1.5, 2.5], yticklabels=list(rows))
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    return figure


def rounds(found: Sequence[Sequence[str]], drafts: int) -> Figure:
    """Rounds from top to bottom: each one's tokens (the last is the model's own) and the drafts it threw away."""
    figure, axes = canvas(f"Rounds of {drafts} drafts: what each added to the text", 7.4, 0.9 + 0.3 * len(found))
    for y, pieces in enumerate(found):
        kept = len(pieces) - 1
        for x, piece in enumerate(pieces):
            kind = "draft, kept" if x < kept else "the model's own"
            _box(axes, x, y, 1, repr(piece)[1:-1][:12], *KINDS[kind])
        for x in range(kept, drafts):
            _box(axes, drafts + 1.3 + x - kept, y, 1, "", *KINDS["draft, rejected"])
    axes.set(xlim=(0, 2 * drafts + 1.4), ylim=(len(found), 0), xticks=(), yticks=np.arange(len(found)) + 0.5,
             yticklabels=[f"round {row + 1}" for row in range(len(found))])
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    _legend(axes, KINDS)
    return figure


def rejection(p: np.ndarray, q: np.ndarray, names: Sequence[str]) -> Figure:
    """The two distributions over each other: what is kept of the drafts, what is thrown away, what takes its place."""
    figure, axes = canvas("Drafts come from q; the text must come from p", 7.2, 2.9)
    both, at = np.minimum(p, q), np.arange(len(p))
    kinds = {"kept: min(p, q)": (GREEN, ""), "rejected: q − p": (RED, "xxx"), "drawn instead: p − q": (SKY, "//")}
    heights = (both, np.maximum(q - p, 0), np.maximum(p - q, 0))
    for (colour, hatch), height, below in zip(kinds.values(), heights, (0 * both, both, both), strict=True):
        axes.bar(at, height, 0.62, below, color=colour, alpha=0.45, hatch=hatch, edgecolor=BLACK, linewidth=0.7)
    for x, value in enumerate(p):
        axes.plot([x - 0.4, x + 0.4], [value] * 2, color=BLACK, linewidth=2.2, label="" if x else "p, the model's")
    axes.set(xticks=at, xticklabels=list(names), ylabel="probability")
    axes.legend(loc="upper right")
    _legend(axes, kinds)
    return figure


def lengths(chosen: Mapping[str, Sequence[int]]) -> Figure:
    """How many drafts each round made, a line a machine."""
    figure, axes = canvas("How many drafts a round makes", 7.2, 2.5)
    looks = zip(chosen.items(), ((BLUE, "-", 2.2), (ORANGE, "--", 1.8), (GREEN, ":", 2.2)), strict=False)
    for (name, drafts), (colour, dashes, width) in looks:
        axes.step(np.arange(len(drafts)), drafts, dashes, where="post", color=colour, linewidth=width, label=name)
    axes.set(xlabel="round", ylabel="drafts", yticks=range(max(map(max, chosen.values())) + 1))
    axes.figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    return figure


def stored(result: Result, generated: str = "tg128") -> Figure:
    """Generation with drafts in a stored result, in multiples of generation without: bars as measured, marks as bytes
    and operations alone would have it."""
    plain = next(row for row in result.rows if row.name == generated)
    rows = sorted((row for row in result.rows if row.name.startswith(f"{generated} draft=")), key=lambda row: row.name)
    simulated = " (simulated: accepted by chance)" if any(row.simulated for row in rows) else ""
    figure, axes = canvas(f"{result.model.name}, {result.device.name}\ngeneration with drafts{simulated}", 7.4,
                          1.4 + 0.36 * len(rows))
    seconds = median(plain.samples_ns) / plain.tokens
    for y, row in enumerate(rows):
        speed = seconds * row.tokens / median(row.samples_ns)
        axes.barh(y, speed, 0.6, color=BLUE if row.values["accept"] else SKY, alpha=0.6, edgecolor=BLACK,
                  hatch="" if row.values["accept"] else "//", linewidth=0.6)
        axes.text(0.01, y, f"{speed:.2f}", va="center", fontsize=8,
                  bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1})
        for name, marker, colour in (("bytes", "D", ORANGE), ("ops", "o", PURPLE)):
            cost = getattr(row.counts, name) / getattr(plain.counts, name)
            axes.plot((1 + row.values["kept"]) / cost, y, marker, color=colour, markeredgecolor=BLACK, markersize=6,
                      label="" if y else {"bytes": "if bytes were all", "ops": "if operations were all"}[name])
    axes.axvline(1, color=BLACK, linewidth=1, linestyle="--")
    axes.set(yticks=range(len(rows)), xlabel="times as fast as without drafts",
             yticklabels=[row.name.removeprefix(generated).strip() for row in rows])
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure
