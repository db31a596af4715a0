"""Pictures of chapter 06: who is asked, how evenly the work is spread, and what reading experts costs."""
import numpy as np
from matplotlib.figure import Figure
from matplotlib.pyplot import close, subplots

from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, canvas, logarithmic

SHADES = "Blues"            # pale to dark, the same order for every eye and in grey print
LINES = ((BLUE, "o-"), (RED, "s--"), (GREEN, "^-."), (ORANGE, "D:"), (PURPLE, "v-"))


def label(token: str) -> str:
    """A token as an axis can show it: spaces and line ends made visible."""
    return token.replace(" ", "␣").replace("\n", "↵") if len(token.strip()) < len(token) else token


def probabilities(names: list[str], every: np.ndarray, ids: np.ndarray, probs: np.ndarray) -> Figure:
    """The router's softmax for a few tokens; the picked experts stand out, with their renormalised weights.

    every (tokens, experts); ids, probs (tokens, used).
    """
    figure, axes = subplots(1, len(names), sharey=True, figsize=(8.4, 2.5), squeeze=False)
    close(figure)
    for place, name, row, picked, weights in zip(axes[0], names, every, ids, probs, strict=True):
        place.bar(range(len(row)), row, color=SKY)
        place.bar(picked, row[picked], color=ORANGE, hatch="//", edgecolor=BLACK, linewidth=0.5)
        for expert, weight in zip(picked, weights, strict=True):
            place.text(expert, row[expert], f"{weight:.2f}", ha="center", va="bottom", fontsize=7)
        place.set_title(f"token “{label(name)}”")
        place.set_xlabel("expert")
    axes[0, 0].set_ylabel("probability")
    return figure


def ranks(probs: np.ndarray, ahead: np.ndarray, used: int) -> Figure:
    """Who is ahead of whom: a row an expert, dark where another one is more probable; its place stands behind it, and
    of those that are picked the probability."""
    figure, axes = canvas("Dark: expert j (across) is ahead of expert i (down)", 4.2, 3.2)
    axes.imshow(ahead, cmap=SHADES, vmin=0, vmax=1.4)
    for expert, place in enumerate(ahead.sum(axis=1)):
        best = place < used
        axes.text(len(probs) - 0.2, expert, f"{place}: {probs[expert]:.2f}" if best else f"{place}", va="center",
                  fontsize=8, color=RED if best else BLACK, fontweight="bold" if best else "normal")
    axes.set(xticks=range(0, len(probs), 5), yticks=range(0, len(probs), 5))
    axes.tick_params(labelsize=7)
    axes.grid(visible=False)
    return figure


def routing(names: list[str], layers: dict[str, tuple[np.ndarray, np.ndarray]], experts: int) -> Figure:
    """Which experts fire for which token: a panel a layer, tokens from left to right, darker for more weight.

    layers: name -> ids and probs, (tokens, used) each.
    """
    figure, axes = subplots(len(layers), 1, sharex=True, figsize=(8.4, 0.9 + 0.85 * len(layers)), squeeze=False)
    close(figure)
    for place, (name, (ids, probs)) in zip(axes[:, 0], layers.items(), strict=True):
        grid = np.zeros((len(names), experts))
        np.put_along_axis(grid, ids, probs, axis=1)
        place.imshow(np.ma.masked_equal(grid.T, 0), cmap=SHADES, aspect="auto", vmin=-0.2, vmax=0.6)
        place.set(ylabel=name, yticks=[0, experts - 1])
        place.set_xticks(np.arange(len(names) + 1) - 0.5, minor=True)
        place.grid(visible=False)
        place.grid(which="minor", axis="x", color="#EEEEEE")
        place.tick_params(which="minor", length=0)
    axes[0, 0].set_title("Experts (down) that fire for each token (across); darker: more weight")
    axes[-1, 0].set_xticks(range(len(names)), [label(name) for name in names], rotation=90, fontsize=7)
    return figure


def sharing(same: list[float], different: list[float], chance: float) -> Figure:
    """Experts that two tokens have in common, layer by layer: two that are the same word, and two that are not."""
    figure, axes = canvas("How many of their experts do two tokens share?", 6, 2.5)
    axes.plot(same, "o-", color=BLUE, label="the same token, at two places")
    axes.plot(different, "s--", color=ORANGE, label="two different tokens")
    axes.axhline(chance, linestyle=":", color=BLACK, label="picked by chance")
    axes.set(xlabel="layer", ylabel="experts in common", ylim=(0, None), xticks=range(len(same)))
    axes.legend(loc="lower right", ncols=3, fontsize=8)
    return figure


def gates(names: list[str], values: np.ndarray) -> Figure:
    """How far the shared expert's gate opens, for every token (across) in every layer (down). (layers, tokens)."""
    figure, axes = canvas("The shared expert's gate: 0 is shut, 1 is open", 8.4, 2.4)
    shown = axes.imshow(values, cmap=SHADES, aspect="auto", vmin=0, vmax=1)
    axes.set(ylabel="layer", yticks=range(len(values)))
    axes.set_xticks(range(len(names)), [label(name) for name in names], rotation=90, fontsize=7)
    axes.grid(visible=False)
    figure.colorbar(shown, pad=0.01)
    return figure


def balance(counts: np.ndarray) -> Figure:
    """How often each expert (across) of each layer (down) was asked, in multiples of an equal share."""
    figure, axes = canvas("Work of each expert, in multiples of an equal share", 7, 2.6)
    load = counts / counts.mean(axis=1, keepdims=True)
    shown = axes.imshow(load, cmap=SHADES, aspect="auto", vmin=0)
    axes.set(xlabel="expert", ylabel="layer", xticks=range(counts.shape[1]), yticks=range(counts.shape[0]))
    axes.grid(visible=False)
    figure.colorbar(shown, pad=0.01)
    return figure


def against_tokens(tokens: list[int], lines: dict[str, list[float]], ylabel: str, title: str,
                   mark: tuple[float, str] | None = None) -> Figure:
    """Several quantities against the number of tokens in a batch, both axes logarithmic; `mark` a number of tokens."""
    figure, axes = canvas(title, 6, 3)
    for (name, values), (colour, style) in zip(lines.items(), LINES, strict=False):
        axes.plot(tokens, values, style, color=colour, label=name, markersize=5)
    logarithmic(axes, "x", "y")
    if mark:
        axes.axvline(mark[0], linestyle=":", color=BLACK, linewidth=1)
        axes.text(mark[0], axes.get_ylim()[0] * 1.1, f" {mark[1]}", fontsize=8, va="bottom")
    axes.set(xlabel="tokens in the batch", ylabel=ylabel, xticks=tokens)
    axes.legend(fontsize=8)
    return figure
