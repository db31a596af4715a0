"""The course's pictures. Colours that colour-blind people can tell apart (Okabe and Ito); lines and hatches differ
too, so that a print in grey stays readable. Importing this module sets matplotlib's style, for your own plots
as well. Functions return figures, save the two at the end.
"""
import inspect
import io
from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import Markdown
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from minillama.measure import Clocks
from minillama.roofline import Roofline
from minillama.units import in_units

BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, RED, PURPLE = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7")
CLOCKS = {"build": (SKY, "//"), "compile": (ORANGE, ".."), "run": (GREEN, "")}     # colour, hatch
STYLE = {
    "figure.dpi": 80, "figure.constrained_layout.use": True, "font.size": 10, "axes.titlesize": 11,
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
    "axes.axisbelow": True, "grid.color": "#DDDDDD", "grid.linewidth": 0.6, "lines.linewidth": 1.8,
    "legend.frameon": False, "hatch.linewidth": 0.5,
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE]),
}
plt.rcParams.update(STYLE)


def compact(figure: Figure) -> bytes:
    """A figure as a PNG of 256 colours: a third of the size, and no eye sees it. Notebooks stay small with it."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight", facecolor="white")
    Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "png", optimize=True)
    return small.getvalue()


if get_ipython() is not None:
    plt.switch_backend(plt.get_backend())       # sets up the notebook's own way of showing figures: ours comes after
    get_ipython().display_formatter.formatters["image/png"].for_type(Figure, compact)


def canvas(title: str, width: float = 7.0, height: float = 3.2) -> tuple[Figure, Axes]:
    """An empty figure, closed to pyplot so that a notebook shows it once, where it is returned."""
    figure, axes = plt.subplots(figsize=(width, height))
    axes.set_title(title)
    plt.close(figure)
    return figure, axes


def logarithmic(axes: Axes, *names: str) -> None:
    """Make axes ("x", "y") logarithmic with plain numbers: powers of ten, and 2 and 5 between where those are few."""
    for name in names:
        axes.set(**{f"{name}scale": "log"})
        axis = getattr(axes, f"{name}axis")
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.9g}" if value < 1e7 else f"{value:.0e}"))
        axis.set_minor_formatter(NullFormatter())


def _box(axes: Axes, x: float, width: float, colour: str, text: str) -> None:
    axes.add_patch(FancyBboxPatch((x, 0.32), width, 0.46, boxstyle="round,pad=0.01", facecolor=colour, alpha=0.35,
                                  edgecolor=BLACK, linewidth=1.0))
    axes.text(x + width / 2, 0.55, text, ha="center", va="center")


def machine(roof: Roofline | None = None) -> Figure:
    """Memory, the pipe, the arithmetic, and Python outside: with the measured numbers of a machine, or without."""
    figure, axes = canvas("What every kernel goes through", height=2.6)
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    _box(axes, 0.01, 0.19, SKY, "Python\n\nsays what\nto run")
    _box(axes, 0.37, 0.22, ORANGE, "memory\n\nweights, states,\nresults")
    _box(axes, 0.79, 0.20, GREEN, "arithmetic\n\nmultiply, add")
    axes.add_patch(FancyArrowPatch((0.21, 0.55), (0.36, 0.55), arrowstyle="->", mutation_scale=14, linestyle="--"))
    for y in (0.48, 0.62):
        ends = ((0.60, y), (0.78, y)) if y > 0.5 else ((0.78, y), (0.60, y))
        axes.add_patch(FancyArrowPatch(*ends, arrowstyle="->", mutation_scale=14, linewidth=3, color="#555555"))
    numbers = ("?", "?", "?") if roof is None else (
        in_units(roof.launch, "s"), in_units(roof.bandwidth, "B/s"), in_units(roof.speed, "FLOP/s"))
    for x, label, number in zip((0.285, 0.69, 0.89), ("a launch costs", "bandwidth", "speed"), numbers, strict=True):
        axes.text(x, 0.17, f"{label}\n{number}", ha="center", va="center", fontweight="bold")
    return figure


def clocks(measured: dict[str, Clocks]) -> Figure:
    """The three clocks of several calls as bars, on one logarithmic scale of milliseconds."""
    figure, axes = canvas("Where the time of one call goes", height=0.9 + 0.75 * len(measured))
    height, floor = 0.26, 1e-3
    for row, clock in enumerate(measured.values()):
        for place, (name, (colour, hatch)) in enumerate(CLOCKS.items()):
            time = getattr(clock, name) * 1e-6
            y = row + (place - 1) * height
            axes.barh(y, max(time, floor), height, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5,
                      label=name if row == 0 else None)
            label = in_units(time * 1e-3, "s") if time else "none"
            axes.text(max(time, floor) * 1.15, y, label, va="center", fontsize=8)
    logarithmic(axes, "x")
    axes.set(xlabel="milliseconds", yticks=range(len(measured)), yticklabels=list(measured))
    axes.set_xlim(floor, 30 * max(clock.total for clock in measured.values()) * 1e-6)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(loc="lower right")
    return figure


def sizes(bytes_moved: list[int], seconds: list[float], roof: Roofline) -> Figure:
    """Time of one kernel against the bytes it moves, beside what its launch and the bandwidth allow."""
    figure, axes = canvas("One kernel, more and more bytes", height=3.4)
    line = np.geomspace(min(bytes_moved), max(bytes_moved), 200)
    axes.plot(line, line / roof.bandwidth * 1e3, "--", color=ORANGE, label="bytes / bandwidth")
    axes.axhline(min(seconds) * 1e3, linestyle=":", color=RED, label="the smallest call")
    axes.plot(bytes_moved, np.array(seconds) * 1e3, "o-", color=BLUE, label="measured")
    axes.set(xlabel="bytes read and written", ylabel="milliseconds", xscale="log")
    logarithmic(axes, "y")
    axes.legend()
    return figure


def roofline(roofs: dict[str, Roofline], points: dict[str, tuple[float, float]] | None = None, of: str = "") -> Figure:
    """Rooflines by name, the first one bold, and named points (operations a byte, operations a second) under it; `of`
    says in the legend what the points are."""
    figure, axes = canvas("The roofline", height=3.8)
    intensity = np.geomspace(1 / 16, 4096, 200)
    styles = zip((BLACK, BLUE, PURPLE, GREEN, RED), ("-", "--", "-.", ":", "--"), strict=True)
    for (name, roof), (colour, line) in zip(roofs.items(), styles, strict=False):
        axes.plot(intensity, [roof.reachable(i) / 1e9 for i in intensity], line, color=colour,
                  linewidth=2.4 if colour == BLACK else 1.2, label=name)
    for name, (x, y) in (points or {}).items():
        axes.plot(x, y / 1e9, "o", color=ORANGE, markeredgecolor=BLACK, label=of)
        axes.annotate(name, (x, y / 1e9), xytext=(5, -11), textcoords="offset points", fontsize=8)
        of = ""     # in the legend once
    logarithmic(axes, "x", "y")
    axes.set(xlabel="operations a byte", ylabel="10⁹ operations a second")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8)
    return figure


def batches(tokens: list[int], seconds: list[float], allowed: list[float]) -> Figure:
    """Time of one product against the number of tokens in it, beside what the roofline allows."""
    figure, axes = canvas("Several tokens share one reading of the weights", height=3.4)
    axes.plot(tokens, np.array(seconds) * 1e3, "o-", color=BLUE, label="measured")
    axes.plot(tokens, np.array(allowed) * 1e3, "--", color=ORANGE, label="the roofline allows")
    axes.plot(tokens, np.array(tokens) * seconds[0] * 1e3, ":", color=RED, label="one token at a time")
    logarithmic(axes, "x", "y")
    axes.set(xlabel="tokens in one product", ylabel="milliseconds", xticks=tokens)
    axes.legend()
    return figure


def compared(prediction: float | None, allowed: float, measured: float, unit: str = "s") -> None:
    """Print a learner's prediction (None: none was made), what the roofline allows and what was measured."""
    said = "none yet" if prediction is None else in_units(prediction, unit)
    print(f"your prediction    {said}")
    print(f"roofline allows    {in_units(allowed, unit)}")
    times = f"{measured / allowed:.2g}" if measured < 99.5 * allowed else f"{measured / allowed:,.0f}"
    print(f"measured           {in_units(measured, unit)}, {times} times that")


def source(thing: Callable) -> Markdown:
    """The source of a function or class of the package, as it stands there today."""
    return Markdown(f"```python\n{inspect.getsource(thing)}```")
