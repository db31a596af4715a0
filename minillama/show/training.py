"""Pictures of appendix A2: who learns which token, and how losses fall."""
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.pyplot import close, subplots

from minillama.show import BLACK, BLUE, GREEN, ORANGE, SKY, canvas

LOSSES = (("next token", BLUE, "-"), ("first draft", ORANGE, "--"), ("second draft", GREEN, ":"))


def targets(length: int = 5) -> Figure:
    """What the model and both steps of the block read of a text, and which token each position learns."""
    figure, axes = canvas("Who learns which token", 7.4, 2.9)
    axes.axis("off")
    rows = (("the model", 0, BLUE), ("the block", 1, ORANGE), ("the block, on its own output", 2, GREEN))
    for place in range(length + 3):
        axes.add_patch(Rectangle((place, 3.1), 0.86, 0.6, facecolor=SKY, alpha=0.4, edgecolor=BLACK, linewidth=0.8))
        axes.text(place + 0.43, 3.4, f"{place}", ha="center", va="center", fontsize=9)
    axes.text(-0.2, 3.4, "tokens of the text", ha="right", va="center", fontsize=9)
    for row, (name, ahead, colour) in enumerate(rows):
        y = 2.2 - 0.95 * row
        axes.text(-0.2, y + 0.25, name, ha="right", va="center", fontsize=9)
        for place in range(length):
            axes.add_patch(Rectangle((place, y), 0.86, 0.5, facecolor=colour, alpha=0.25, edgecolor=colour))
            axes.text(place + 0.43, y + 0.25, f"→ {place + ahead + 1}", ha="center", va="center", fontsize=9)
            if row:
                axes.add_patch(FancyArrowPatch((place + 0.43, y + 0.95), (place + 0.43, y + 0.5), arrowstyle="-|>",
                                               mutation_scale=7, color="#888888", linewidth=0.7))
        if ahead:
            axes.text(length + 0.1, y + 0.25, f"also reads tokens {ahead} … {length + ahead - 1}", va="center",
                      fontsize=8, color="#555555")
    axes.set(xlim=(-3.0, length + 3.1), ylim=(0.1, 3.9))
    return figure


def curves(runs: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], title: str, unit: str) -> Figure:
    """Losses against progress, a panel a run: left those in nats (next token, drafts), right the experts' balance.
    A run is (progress, losses of each point: next token, first draft, second draft, balance)."""
    figure, axes = subplots(len(runs), 2, figsize=(8, 2.7 * len(runs)), width_ratios=(3, 1), squeeze=False)
    close(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for (name, (progress, points)), (left, right) in zip(runs.items(), axes, strict=True):
        for place, (label, colour, line) in enumerate(LOSSES):
            left.plot(progress, [point[place] for point in points], line, color=colour, label=label)
        left.set(xlabel=unit, ylabel=f"nats a token, {name}", ylim=(0, None))
        left.legend(fontsize=8)
        right.plot(progress, [point[3] for point in points], color=BLACK)
        right.set(xlabel=unit, ylabel="balance", ylim=(0.95, max(1.2, *(point[3] for point in points))))
    return figure
