"""Pictures of chapter 07: how a token travels through the engine, what stays of it, how the next one is chosen."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.pyplot import close, subplots

from minillama.config import ModelConfig
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, logarithmic
from minillama.units import in_units


def flow(config: ModelConfig) -> Figure:
    """From ids to an id: embedding, the layers in their pattern, norm and head, sampling; below, what each layer
    keeps of the text."""
    figure, axes = canvas("One step of the engine: the new id comes back as the next step's input", 7.4, 1.9)
    axes.axis("off")
    kinds = [(SKY, "delta\nnet", "window,\nmemory") if recurrent else (ORANGE, "atten-\ntion", "keys,\nvalues")
             for recurrent in config.recurrent]
    parts = [(YELLOW, "embed", ""), *kinds, (GREEN, "norm,\nhead", ""), (PURPLE, "sample", "")]
    for x, (colour, name, kept) in enumerate(parts):
        axes.add_patch(Rectangle((x + 0.05, 1), 0.8, 1.0, facecolor=colour, alpha=0.5, edgecolor=BLACK, snap=True))
        axes.text(x + 0.45, 1.72 if kept else 1.5, name, ha="center", va="center", fontsize=8)
        axes.plot([x - 0.15, x + 0.05], [1.5] * 2, color=BLACK, linewidth=1, snap=True)
        if kept:
            axes.text(x + 0.45, 1.2, "experts", ha="center", va="center", fontsize=7, style="italic")
            axes.text(x + 0.45, 0.22, kept, ha="center", va="center", fontsize=8)
            axes.plot([x + 0.45] * 2, [0.5, 1], color=BLACK, linewidth=1, snap=True)
    axes.text(-0.2, 1.5, "ids", ha="right", va="center")
    axes.text(-0.2, 0.22, "state", ha="right", va="center")
    axes.add_patch(FancyArrowPatch((len(parts) - 0.55, 2.05), (-0.35, 1.75), arrowstyle="->", mutation_scale=10,
                                   connectionstyle="arc3,rad=0.08", linestyle="--"))
    axes.set(xlim=(-0.9, len(parts)), ylim=(0, 2.6))
    return figure


def plans(plans: dict[int, list[int]]) -> Figure:
    """How prompts are cut into batches: a row a prompt, a box a batch, its padding hatched."""
    figure, axes = canvas("A prompt in batches of fixed sizes (hatched: padding)", 7.4, 0.9 + 0.28 * len(plans))
    colours = {size: colour for size, colour in zip((512, 64, 8, 1), (BLUE, SKY, ORANGE, RED), strict=True)}
    for row, (tokens, sizes) in enumerate(plans.items()):
        left = 0
        for size in sizes:
            text = min(size, tokens - left)
            axes.barh(row, text, 0.7, left, color=colours.get(size, GREEN), edgecolor="white")
            axes.barh(row, size - text, 0.7, left + text, color="white", hatch="////", edgecolor="#888888")
            if size > 20:
                axes.text(left + size / 2, row, str(size), ha="center", va="center", fontsize=8)
            left += size
    axes.set_yticks(range(len(plans)), [f"{tokens} tokens" for tokens in plans])
    axes.set_xlabel("positions computed")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def memory(tokens: list[int], kinds: dict[str, list[float]]) -> Figure:
    """Bytes of state against the length of the text."""
    figure, axes = canvas("What a text leaves behind", 6, 2.8)
    for (name, sizes), style in zip(kinds.items(), ("o-", "s--", "^-."), strict=False):
        axes.plot(tokens, sizes, style, label=name, markersize=4)
    logarithmic(axes, "x", "y")
    axes.yaxis.set_major_formatter(lambda value, _: in_units(value, "B"))
    axes.set(xlabel="tokens of text")
    axes.legend(fontsize=8)
    return figure


def cuts(names: list[str], stages: dict[str, np.ndarray], count: int = 8) -> Figure:
    """The most probable tokens, and what each stage of sampling leaves of them; stages: name -> probabilities."""
    best = np.argsort(-next(iter(stages.values())))[:count]
    figure, axes = subplots(1, len(stages), sharey=True, figsize=(8.4, 2.5), squeeze=False)
    close(figure)
    for place, (name, probs) in zip(axes[0], stages.items(), strict=True):
        place.barh(range(count), probs[best], color=[BLUE if p else "#DDDDDD" for p in probs[best]])
        place.set_title(f"{name}\n{np.count_nonzero(probs):,} tokens left", fontsize=9)
        place.set_xlim(0, 1)
        place.grid(axis="y", visible=False)
    axes[0, 0].set_yticks(range(count), [repr(names[i])[1:-1] for i in best], fontsize=8)
    axes[0, 0].invert_yaxis()
    return figure
