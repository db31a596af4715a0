"""Pictures of appendix A1: who computes what on each backend, and what a rendered kernel asks of a device."""
import re
from collections.abc import Mapping

from matplotlib.figure import Figure

from minillama.show import BLUE, GREEN, ORANGE, canvas, logarithmic

LEVELS = (("blocks", BLUE, ""), ("threads in a block", ORANGE, "//"), ("products in a thread", GREEN, ".."))


def shares(grids: Mapping[str, tuple[int, int]], products: int, title: str) -> Figure:
    """A bar for each backend, its grid (blocks, threads in a block); lengths multiply to the kernel's products."""
    figure, axes = canvas(title, 7.6, 2.6)
    for place, (blocks, threads) in enumerate(grids.values()):
        start = 1
        counts = blocks, threads, products // (blocks * threads)
        for (name, colour, hatch), count in zip(LEVELS, counts, strict=True):
            if count > 1:
                axes.barh(place, start * count - start, left=start, color=colour, hatch=hatch, alpha=0.65,
                          edgecolor="white", label=name if name not in axes.get_legend_handles_labels()[1] else None)
                axes.text(start * count ** 0.5, place, f"{count:,}", ha="center", va="center", fontsize=9,
                          bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5})
            start *= count
    axes.set(yticks=range(len(grids)), xlim=(1, products), xlabel="products, as a product of who and how many")
    axes.set_yticklabels(grids)
    axes.invert_yaxis()
    logarithmic(axes, "x")
    axes.legend(*_in_order(axes), loc="upper center", bbox_to_anchor=(0.5, -0.28), ncols=3)
    return figure


def _in_order(axes) -> tuple[list, list]:
    """Legend entries as the levels nest."""
    found = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    names = [name for name, *_ in LEVELS if name in found]
    return [found[name] for name in names], names


def rows(seconds: Mapping[int, float], chosen: int, nbytes: int, title: str) -> Figure:
    """Bytes of weights a second against rows to a thread; the table's choice is filled."""
    figure, axes = canvas(title, 6.4, 2.6)
    speeds = {count: nbytes / took / 1e9 for count, took in seconds.items()}
    axes.bar([str(count) for count in speeds], list(speeds.values()), edgecolor=BLUE,
             color=[BLUE if count == chosen else "white" for count in speeds],
             hatch=["" if count == chosen else "//" for count in speeds])
    for place, speed in enumerate(speeds.values()):
        axes.text(place, speed, f"{speed:.3g}", ha="center", va="bottom", fontsize=9)
    axes.set(xlabel="rows to a thread (filled: as the table has it)", ylabel="GB/s of weights",
             ylim=(0, 1.15 * max(speeds.values())))
    return figure


def buffers(source: str) -> int:
    """Buffers among the arguments of a rendered kernel."""
    return len(set(re.findall(r"\bdata\d+_\d+\b", source.split("{")[0])))


def shared_bytes(source: str) -> int:
    """Bytes of float32 that the threads of a block share, of a kernel rendered for Metal."""
    return 4 * sum(map(int, re.findall(r"threadgroup\s+(?:__attribute__\S+\s+)?float\s+\w+\[(\d+)\]", source)))
