"""Pictures of chapter 03: the path of a token through gated attention, rotated pairs, shared heads, masks, gates."""
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Arc, FancyArrowPatch, Rectangle
from matplotlib.pyplot import close, subplots

from minillama.config import ModelConfig
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, logarithmic

MARKS = ((BLUE, "o", "-"), (ORANGE, "s", "--"), (GREEN, "^", "-."), (RED, "D", ":"))
GROUPS = ((SKY, ""), (ORANGE, "//"), (GREEN, ".."), (PURPLE, "xx"))


def flow(config: ModelConfig) -> Figure:
    """What becomes of one token: products, norms, rotation, the sum over earlier tokens, the gate; sizes by config."""
    c = config
    figure, axes = canvas("One token on its way through gated attention", width=7.6, height=3.1)
    axes.set(xlim=(0, 10.2), ylim=(-0.1, 4.1))
    axes.axis("off")
    q, kv = f"{c.heads} × {c.head_dim}", f"{c.kv_heads} × {c.head_dim}"
    boxes = {"x": (0.6, 2, f"token\n{c.hidden}", SKY), "gate": (2.4, 3.5, f"gate\n{q}", YELLOW),
             "q": (2.4, 2.5, f"query\n{q}", ORANGE), "k": (2.4, 1.5, f"key\n{kv}", GREEN),
             "v": (2.4, 0.5, f"value\n{kv}", PURPLE), "qr": (4.3, 2.5, "norm,\nrotate", ORANGE),
             "kr": (4.3, 1.5, "norm,\nrotate", GREEN), "cache": (6.1, 1.0, "cache: keys,\nvalues so far", SKY),
             "sum": (7.5, 2.5, f"softmax(q·k) v\n{q}", ORANGE), "times": (8.3, 3.5, "× sigmoid(gate)", YELLOW),
             "out": (9.5, 2, f"output\n{c.hidden}", SKY)}
    for x, y, text, colour in boxes.values():
        axes.text(x, y, text, ha="center", va="center", fontsize=8,
                  bbox={"boxstyle": "round,pad=0.35", "facecolor": colour, "alpha": 0.4, "edgecolor": BLACK})
    for pair in ("x gate", "x q", "x k", "x v", "q qr", "k kr", "kr cache", "v cache", "qr sum", "cache sum",
                 "gate times", "sum times", "times out"):
        (start, end) = ((boxes[name][0], boxes[name][1]) for name in pair.split())
        axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, shrinkA=27,
                                       shrinkB=44 if pair == "gate times" else 30, linewidth=1, zorder=0))
    return figure


def norms(before: np.ndarray, after: np.ndarray) -> Figure:
    """Root mean square of each token's row, before and after a norm (without its weight)."""
    figure, axes = canvas("The size of each token's row", width=6, height=2.3)
    for rows, (colour, marker, _), name in ((before, MARKS[1], "before"), (after, MARKS[0], "after")):
        axes.plot(np.sqrt((rows ** 2).mean(axis=-1)), marker, color=colour, markersize=4, label=name)
    axes.set(xlabel="token", ylabel="root mean square", ylim=(0, None))
    axes.legend()
    return figure


def rotary(table: np.ndarray, head_dim: int) -> Figure:
    """Which dimensions of a head are turned together, and how fast; table (positions, 2, pairs): cosines and sines."""
    positions, _, pairs = table.shape
    figure, (strip, heat) = subplots(2, 1, figsize=(7, 3.6), height_ratios=(1, 1.5))
    close(figure)
    strip.set_title(f"{2 * pairs} of {head_dim} dimensions are rotated, i together with i + {pairs}")
    for start, end, colour, hatch, text in ((0, pairs, SKY, "", "first"),
                                            (pairs, 2 * pairs, ORANGE, "//", "second"),
                                            (2 * pairs, head_dim, "#DDDDDD", "", "pass unchanged")):
        strip.add_patch(Rectangle((start, 0), end - start, 1, facecolor=colour, alpha=0.6, hatch=hatch,
                                  edgecolor=BLACK))
        strip.text((start + end) / 2, 0.5, text, ha="center", va="center", fontsize=8)
    for i in range(0, pairs, max(1, pairs // 8)):
        strip.add_patch(Arc((i + 0.5 + pairs / 2, 1), pairs, 1.6, theta1=0, theta2=180, color=BLUE, linewidth=1))
    strip.set(xlim=(0, head_dim), ylim=(0, 2), yticks=(), xticks=(0, pairs, 2 * pairs, head_dim))
    heat.imshow(table[:, 0].T, aspect="auto", cmap="cividis", vmin=-1, vmax=1, interpolation="nearest")
    heat.set_title("cosine of each pair's angle, dark −1, bright +1: the first turn fast, the last hardly at all")
    heat.set(xlabel="position", ylabel="pair")
    for axes in (strip, heat):
        axes.grid(visible=False)
        axes.title.set_fontsize(10)
    return figure


def distances(products: Mapping[str, np.ndarray]) -> Figure:
    """The product of a rotated query and a rotated key against their distance, for several places of the key."""
    figure, axes = canvas("Rotated, a product knows the distance and nothing else", width=6, height=2.6)
    for place, ((name, values), (colour, _, line)) in enumerate(zip(products.items(), MARKS[:3][::-1], strict=False)):
        axes.plot(values, line, color=colour, label=name, linewidth=6 - 2 * place)
    axes.set(xlabel="distance of query and key", ylabel="product")
    axes.legend(fontsize=8)
    return figure


def groups(heads: int, kv_heads: int) -> Figure:
    """Which query head reads which key/value head."""
    figure, axes = canvas(f"{heads} query heads read {kv_heads} key/value heads", height=2.0)
    axes.set(xlim=(-0.6, heads - 0.4), ylim=(-0.5, 1.6))
    axes.axis("off")
    group = heads // kv_heads
    for head in range(heads):
        mine = head // group
        colour, hatch = GROUPS[mine % 4]
        below = mine * group + (group - 1) / 2
        axes.plot([head, below], [1.0, 0.2], color=BLACK, linewidth=0.7, zorder=0)
        axes.add_patch(Rectangle((head - 0.35, 0.95), 0.7, 0.5, facecolor=colour, hatch=hatch, edgecolor=BLACK))
        axes.text(head, 1.2, str(head), ha="center", va="center", fontsize=8, bbox={"facecolor": "white", "pad": 1,
                                                                                      "edgecolor": "none"})
        if head % group == 0:
            axes.add_patch(Rectangle((below - 0.9, -0.3), 1.8, 0.5, facecolor=colour, hatch=hatch, edgecolor=BLACK))
            axes.text(below, -0.05, f"KV {mine}", ha="center", va="center", fontsize=8,
                      bbox={"facecolor": "white", "pad": 1, "edgecolor": "none"})
    return figure


def mask(seen: np.ndarray, start: int) -> Figure:
    """Which positions (columns) each token of a batch (rows) may see; the batch begins at position `start`."""
    tokens, positions = seen.shape
    figure, axes = canvas(f"Tokens {start} to {start + tokens - 1} and what they see", width=5.5,
                          height=1.1 + 0.28 * tokens)
    for (row, column), yes in np.ndenumerate(seen):
        axes.add_patch(Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, facecolor=SKY if yes else "white",
                                 hatch="" if yes else "xxx", edgecolor="#888888", linewidth=0.5))
    axes.set(xlim=(-0.6, positions - 0.4), ylim=(tokens - 0.4, -0.6), xticks=range(positions), yticks=range(tokens),
             yticklabels=range(start, start + tokens), xlabel="position that is looked at", ylabel="token")
    axes.grid(visible=False)
    return figure


def _labels(axes: Axes, pieces: Sequence[str], *names: str) -> None:
    shown = [piece.replace(" ", "·").replace("\n", "⏎") for piece in pieces]
    for name in names:
        axes.set(**{f"{name}ticks": range(len(shown))})
        getattr(axes, f"set_{name}ticklabels")(shown, fontsize=7, family="monospace", rotation=90 * (name == "x"))


def weights(maps: Mapping[str, np.ndarray], pieces: Sequence[str]) -> Figure:
    """How much each token (rows) takes from each earlier one (columns), for several heads; the future is blank."""
    figure, all_axes = subplots(1, len(maps), figsize=(8.5, 0.9 + 8 / len(maps)), sharey=True, squeeze=False,
                                layout="constrained")
    close(figure)
    for axes, (name, values) in zip(all_axes[0], maps.items(), strict=True):
        past = np.where(np.tri(len(values), dtype=bool), values, np.nan)
        image = axes.imshow(past, cmap="cividis", vmin=0, vmax=0.6, interpolation="nearest")
        axes.set_title(name, fontsize=10)
        axes.grid(visible=False)
        _labels(axes, pieces, "x")
    _labels(all_axes[0, 0], pieces, "y")
    figure.supxlabel("token that is looked at", fontsize=9)
    figure.supylabel("token that looks", fontsize=9)
    figure.colorbar(image, ax=list(all_axes[0]), pad=0.01, shrink=0.6, label="weight")
    return figure


def gates(opened: np.ndarray, pieces: Sequence[str]) -> Figure:
    """How far each head's gate is open at each token, (heads, tokens), averaged over the head's dimensions."""
    figure, axes = canvas("How far each head's gate is open (mean over its dimensions)", width=7, height=2.3)
    image = axes.imshow(opened, aspect="auto", cmap="cividis", vmin=0, interpolation="nearest")
    figure.colorbar(image, ax=axes, pad=0.01)
    axes.set(yticks=range(len(opened)), ylabel="head")
    axes.grid(visible=False)
    _labels(axes, pieces, "x")
    return figure


def growing(positions: Sequence[int], lines: Mapping[str, Sequence[float]], ylabel: str, title: str) -> Figure:
    """Quantities against the length of the text, on logarithmic scales."""
    figure, axes = canvas(title, height=3.0)
    for (name, values), (colour, marker, line) in zip(lines.items(), MARKS, strict=False):
        axes.plot(positions, values, marker + line, color=colour, label=name)
    logarithmic(axes, "x", "y")
    axes.set(xlabel="tokens in the text", ylabel=ylabel)
    axes.legend(fontsize=9)
    return figure
