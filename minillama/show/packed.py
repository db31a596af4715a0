"""Pictures of chapter 12: how a packed weight travels, how its bits lie, and what a format costs in time."""
from collections.abc import Mapping
from textwrap import wrap

from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.pyplot import close, subplots
from tinygrad import TinyJit
from tinygrad.uop.ops import Ops

from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, logarithmic

GREY = "#BBBBBB"
LEGS = {"read packed": (SKY, ""), "written as float32": (RED, "xx"), "read as float32": (ORANGE, "//")}


def ways(moved: Mapping[str, Mapping[str, float]]) -> Figure:
    """Bits that memory moves for one weight in one product: a bar a way, stacked by the legs of the journey (those of
    LEGS)."""
    figure, axes = canvas("What memory moves for one weight, used once", 7.4, 1.1 + 0.36 * len(moved))
    for row, legs in enumerate(moved.values()):
        left = 0.0
        for name, bits in legs.items():
            colour, hatch = LEGS[name]
            axes.barh(row, bits, 0.62, left, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5,
                      label=name if name not in axes.get_legend_handles_labels()[1] else None)
            left += bits
        axes.text(left + 0.6, row, f"{left:g} bits", va="center", fontsize=9)
    axes.set(yticks=range(len(moved)), yticklabels=list(moved), xlabel="bits")
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=3, fontsize=8)
    return figure


def strips(arrays: Mapping[str, str], word: int = 4) -> Figure:
    """Bytes in memory as strips, a letter a byte: s for a scale, a digit for the quants of a block; a black line at
    each address that a word can begin at."""
    colours = {"s": (RED, "xx"), "0": (SKY, ""), "1": (ORANGE, "//")}
    longest = max(map(len, arrays.values()))
    figure, axes = canvas("Two blocks in memory; a word can be read where a black line stands", 7.8,
                          0.7 + 0.5 * len(arrays))
    axes.set(xlim=(-0.3, longest + 0.3), ylim=(len(arrays) - 0.3, -0.6))
    for row, letters in enumerate(arrays.values()):
        for at, letter in enumerate(letters):
            colour, hatch = colours[letter]
            axes.add_patch(Rectangle((at, row - 0.3), 1, 0.6, facecolor=colour, hatch=hatch, alpha=0.6,
                                     edgecolor="white", linewidth=0.8))
        for at in range(0, len(letters) + 1, word):
            axes.plot([at, at], [row - 0.42, row + 0.42], color=BLACK, linewidth=1.6)
    axes.set_yticks(range(len(arrays)), list(arrays))
    axes.set_xticks(())
    axes.grid(visible=False)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def float_bits(rows: Mapping[str, int], quant: range) -> Figure:
    """The 32 bits of some numbers, the highest on the left; sign, exponent and mantissa apart, the bits numbered in
    `quant` marked."""
    figure, axes = canvas("32 bits: sign, exponent, mantissa (hatched: where the quant goes)", 7.8,
                          0.6 + 0.42 * len(rows))
    axes.set(xlim=(0, 32.5), ylim=(len(rows), 0))
    axes.grid(visible=False)
    for row, value in enumerate(rows.values()):
        for bit in range(31, -1, -1):
            colour = GREY if bit == 31 else ORANGE if bit >= 23 else SKY
            axes.add_patch(Rectangle((31 - bit + 0.25 * (bit < 31) + 0.25 * (bit < 23), row + 0.12), 0.94, 0.76,
                                     facecolor=colour, alpha=0.5, edgecolor="white",
                                     hatch="///" if bit in quant else ""))
            axes.text(31 - bit + 0.47 + 0.25 * (bit < 31) + 0.25 * (bit < 23), row + 0.52, str(value >> bit & 1),
                      ha="center", va="center", fontsize=8, family="monospace")
    axes.set_yticks([row + 0.5 for row in range(len(rows))], list(rows))
    axes.set_xticks(())
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def formats(measured: Mapping[str, tuple[float, float]], bandwidth: float, title: str) -> Figure:
    """Time of one product with the same matrix in several formats, name -> (bytes, seconds), as bars; a diamond stands
    where the bytes alone would end at that bandwidth."""
    figure, axes = canvas(title, 7, 0.9 + 0.27 * len(measured))
    for row, (size, seconds) in enumerate(measured.values()):
        axes.barh(row, seconds * 1e6, 0.62, color=BLUE)
        axes.plot(size / bandwidth * 1e6, row, "D", color=ORANGE, markeredgecolor=BLACK, markersize=7,
                  label=None if row else "its bytes / bandwidth")
        speed = size / seconds / 1e9
        axes.text(seconds * 1e6, row, f"  {speed:,.0f} GB/s" if speed >= 100 else f"  {speed:.3g} GB/s", va="center",
                  fontsize=8)
    axes.set(yticks=range(len(measured)), yticklabels=list(measured), xlabel="microseconds")
    axes.margins(x=0.16)
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right", fontsize=8)
    return figure


def errors(relative: Mapping[str, float]) -> Figure:
    """Relative errors of some ways to compute one product, as bars on a logarithmic scale."""
    figure, axes = canvas("Error of a product of 2,048 terms, against exact sums", 7, 0.8 + 0.3 * len(relative))
    axes.barh(list(relative), list(relative.values()), 0.6, color=[RED, ORANGE, GREEN, BLUE][:len(relative)],
              hatch="//", edgecolor="white")
    for row, value in enumerate(relative.values()):
        axes.text(value, row, f"  {value:.1e}", va="center", fontsize=8)
    axes.invert_yaxis()
    logarithmic(axes, "x")
    axes.set_xlim(min(relative.values()) / 20, max(relative.values()) * 8)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}")
    axes.grid(axis="y", visible=False)
    return figure


def size_quality_speed(points: Mapping[str, tuple[float, float, float]]) -> Figure:
    """Files as (megabytes, bits per byte of text, tokens a second): two panels over one axis of size."""
    figure, panels = subplots(1, 2, figsize=(8.6, 3.0))
    close(figure)
    for axes, which, label, title in ((panels[0], 1, "bits per byte", "Quality (lower is better)"),
                                      (panels[1], 2, "tokens a second", "Speed here (higher is better)")):
        for (name, point), colour, marker in zip(points.items(), (PURPLE, BLUE, GREEN, ORANGE), "sDo^", strict=False):
            axes.plot(point[0], point[which], marker, color=colour, markersize=8, markeredgecolor=BLACK)
            axes.annotate(name, (point[0], point[which]), xytext=(8, 4), textcoords="offset points", fontsize=9)
        axes.set(xlabel="MB", ylabel=label, title=title)
        axes.margins(x=0.25, y=0.25)
    panels[1].set_ylim(0, 1.3 * max(speed for *_, speed in points.values()))
    return figure


def kernel_source(replay: TinyJit, lines: int = 40, number: int = 0) -> Markdown:
    """The first lines of a kernel of a captured function, as its device got to see it."""
    source = next(part.arg for part in replay.captured.linear.src[number].src[0].src if part.op is Ops.SOURCE)
    shown = [part for line in source.splitlines() for part in wrap(line, 116, subsequent_indent="        ",
             drop_whitespace=False, break_on_hyphens=False) or [""]]
    rest = [f"... {len(shown) - lines} lines more"] if len(shown) > lines else []
    return Markdown("```c\n" + "\n".join([*shown[:lines], *rest]) + "\n```")
