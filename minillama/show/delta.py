"""Pictures of chapters 04 and 05: memories as images, the convolution's window, triangles, time against length."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.pyplot import close, subplots

from minillama.show import BLACK, BLUE, GREEN, ORANGE, RED, SKY, canvas, logarithmic

SIGNED = "PuOr_r"       # zero is white; colour-blind people can tell its ends apart
LOOKS = ((BLACK, "o", "-"), (ORANGE, "s", "--"), (BLUE, "^", "-."), (GREEN, "D", ":"), (RED, "v", "--"))


def matrices(images: dict[str, np.ndarray], title: str = "", columns: int = 6, width: float = 8.0,
             labels: tuple[str, str] = ("key dimension", "value dimension"), top: float = 0.0) -> Figure:
    """Named matrices as images on one scale up to `top` (else the largest value): white is 0, orange positive, violet
    negative. `labels`: rows, columns."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    figure, axes = subplots(rows, columns, figsize=(width, 0.55 + rows * (0.3 + width / max(columns, 3))),
                            squeeze=False)
    close(figure)
    top = top or max(float(np.abs(image).max()) for image in images.values()) or 1.0
    for place, (name, image) in zip(axes.flat, images.items(), strict=False):
        shown = place.imshow(image, cmap=SIGNED, vmin=-top, vmax=top, interpolation="nearest")
        place.set_title(name, fontsize=9)
        place.set(xticks=[], yticks=[])
        place.grid(visible=False)
        for spine in place.spines.values():
            spine.set(visible=True, linewidth=0.6)
    for place in axes.flat[len(images):]:
        place.axis("off")
    axes[0, 0].set(ylabel=labels[0], xlabel=labels[1])
    figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.01)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure


def vectors(lines: dict[str, np.ndarray], title: str) -> Figure:
    """Vectors of one length over their dimensions, each with its own marker: equal ones lie on top of each other."""
    figure, axes = canvas(title, height=2.4)
    axes.axhline(0, color=BLACK, linewidth=0.6)
    for order, ((name, line), (colour, marker, dashes)) in enumerate(zip(lines.items(), LOOKS, strict=False)):
        axes.plot(line, dashes, marker=marker, color=colour, label=name, linewidth=1.0, markersize=9 - 2 * order,
                  markerfacecolor="none" if order == 0 else colour)
    axes.set(xlabel="value dimension", xticks=range(len(line)))
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure


def curves(lines: dict[str, tuple], title: str, xlabel: str, ylabel: str, logs: str = "") -> Figure:
    """Named curves (x values, y values), told apart by markers and dashes; `logs`: which axes are logarithmic."""
    figure, axes = canvas(title, height=3.2)
    for (name, (x, y)), (colour, marker, dashes) in zip(lines.items(), LOOKS, strict=False):
        axes.plot(x, y, dashes, marker=marker, color=colour, markersize=5, label=name)
    logarithmic(axes, *logs)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.legend()
    return figure


def window(pieces: list[str], width: int) -> Figure:
    """Which inputs each output of a causal convolution reads; the first columns are the window kept from before."""
    kept, count = width - 1, len(pieces)
    figure, axes = canvas("The window slides: each row is one output", width=7.5, height=0.8 + 0.32 * count)
    for column in range(kept + count):
        for row in range(count):
            read = row <= column < row + width
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=(ORANGE if column < kept else SKY) if read
                                     else "white", hatch="//" if read and column < kept else "",
                                     edgecolor=BLACK, linewidth=0.6))
    for row in range(count):
        axes.text(kept + row + 0.5, row + 0.5, "now", ha="center", va="center", fontsize=8)
    axes.add_patch(Rectangle((count, 0), kept, count, fill=False, edgecolor=BLACK, linewidth=3))
    axes.set(xlim=(0, kept + count), ylim=(count, 0), xlabel="inputs: kept (hatched) | new; framed: kept for the next",
             ylabel="outputs", xticks=np.arange(kept + count) + 0.5, yticks=np.arange(count) + 0.5)
    axes.set_xticklabels([f"-{kept - i}" for i in range(kept)] + pieces, family="monospace", fontsize=8)
    axes.set_yticklabels(pieces, family="monospace", fontsize=8)
    axes.grid(visible=False)
    axes.tick_params(length=0)
    return figure


def mosaic(heads: np.ndarray, pool: int = 4) -> np.ndarray:
    """The memories of one layer, (heads, dim, dim), as one image, two heads in a row with zeros between: of each
    `pool` × `pool` values the one that is largest in size."""
    count, dim, _ = heads.shape
    blocks = heads.reshape(count, dim // pool, pool, dim // pool, pool).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(count, dim // pool, dim // pool, pool * pool)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(-1, keepdims=True), -1)[..., 0]
    padded = np.pad(largest, ((0, count % 2), (1, 1), (1, 1)))
    rows = padded.reshape(-1, 2, *padded.shape[1:]).transpose(0, 2, 1, 3)
    return rows.reshape(rows.shape[0] * rows.shape[1], -1)


def bars(groups: dict[str, np.ndarray], title: str, xlabel: str, ylabel: str, names: list[str]) -> Figure:
    """Named rows of bars side by side over `names`, told apart by colour and hatch."""
    figure, axes = canvas(title, width=8.0, height=2.8)
    share = 0.8 / len(groups)
    looks = zip((SKY, ORANGE, GREEN, RED), ("", "//", "..", "xx"), strict=True)
    for order, ((name, values), (colour, hatch)) in enumerate(zip(groups.items(), looks, strict=False)):
        axes.bar(np.arange(len(values)) + (order - (len(groups) - 1) / 2) * share, values, share, color=colour,
                 hatch=hatch, edgecolor=BLACK, linewidth=0.5, label=name)
    axes.set(xlabel=xlabel, ylabel=ylabel, xticks=range(len(names)))
    axes.set_xticklabels(names, family="monospace" if xlabel == "token" else None)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(axis="x", visible=False)
    return figure


def triangles(images: dict[str, np.ndarray], pieces: list[str], title: str, top: float = 0.0) -> Figure:
    """Matrices over pairs of tokens side by side: row i is the token that looks, column j the one that was written."""
    count = len(images)
    figure, axes = subplots(1, count, figsize=(1.2 + 3.6 * count, 4.2), squeeze=False)
    close(figure)
    top = top or max(float(np.abs(image).max()) for image in images.values())
    for place, (name, image) in zip(axes.flat, images.items(), strict=True):
        shown = place.imshow(image, cmap=SIGNED, vmin=-top, vmax=top, interpolation="nearest")
        place.set_title(name, fontsize=9)
        place.set(xticks=range(len(pieces)), yticks=range(len(pieces)))
        place.set_xticklabels(pieces, rotation=90, fontsize=6, family="monospace")
        place.set_yticklabels(pieces, fontsize=6, family="monospace")
        place.plot([-0.5, len(pieces) - 0.5], [-0.5, len(pieces) - 0.5], color=BLACK, linewidth=0.6)
        place.grid(visible=False)
        place.tick_params(length=0)
    figure.colorbar(shown, ax=axes, shrink=0.7, pad=0.01)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return figure
