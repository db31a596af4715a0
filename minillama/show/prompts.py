"""Pictures of chapter 16: what of a prompt's tokens is read by anybody, and what each recipe costs a prompt."""
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from matplotlib.pyplot import close, subplots

from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas

STYLES = {      # colour, hatch
    "without": ("#BBBBBB", ""), "logits": (RED, "xx"), "hidden": (ORANGE, "//"), "kv": (GREEN, ""),
    "head": (RED, "xx"), "block": (ORANGE, "//"), "with MTP": (PURPLE, ".."), "pre-norm": (SKY, "//"),
    "post-norm": (BLUE, "")}
STAGES = ("norms,\neh_proj", "keys,\nvalues", "query", "attention", "experts", "norm,\nhead")


def groups(data: dict[str, dict[str, tuple[float, float]]], title: str, unit: str, digits: int = 0) -> Figure:
    """Bars in groups, each of a name in STYLES; a pair of different numbers is a range, drawn as a line at the end."""
    count = sum(len(bars) for bars in data.values())
    figure, axes = canvas(title, 7.4, 0.8 + 0.24 * count + 0.16 * len(data))
    place, ticks, most = 0.0, [], max(high for bars in data.values() for _, high in bars.values())
    for bars in data.values():
        ticks.append(place + (len(bars) - 1) / 2)
        for name, (low, high) in bars.items():
            colour, hatch = STYLES[name]
            axes.barh(place, (low + high) / 2, 0.8, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5)
            axes.plot([low, high], [place, place], color=BLACK, linewidth=2.5)
            number = f"{low:,.{digits}f}" + (f"–{high:,.{digits}f}" if high > low else "")
            axes.text(high + most / 100, place, f"{number}  {name}", va="center", fontsize=8)
            place += 1
        place += 0.7
    axes.set(yticks=ticks, yticklabels=list(data), xlabel=unit, xlim=(0, 1.25 * most))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    return figure


def beside(recipes: dict[str, dict[str, float]], title: str) -> Figure:
    """Operations beside the layers', as percentages of theirs: a bar a recipe, its parts one after the other."""
    figure, axes = canvas(title, 7.4, 0.9 + 0.35 * len(recipes))
    names = list(dict.fromkeys(name for parts in recipes.values() for name in parts))
    for row, parts in enumerate(recipes.values()):
        left = 0.0
        for name in names:
            colour, hatch = STYLES[name]
            width = 100 * parts.get(name, 0.0)
            axes.barh(row, width, 0.65, left, color=colour, hatch=hatch, edgecolor=BLACK, linewidth=0.5,
                      label=name if row == 0 else None)
            left += width
        axes.text(left, row, f" {left:.2f} %", va="center", fontsize=9)
    axes.set(yticks=range(len(recipes)), yticklabels=list(recipes), xlabel="% of the layers' operations")
    axes.margins(x=0.12)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=8, loc="lower right")
    return figure


def needed(tokens: int = 8) -> Figure:
    """What of the block is read by anybody: its stages for earlier tokens and for the last one, and its attention as a
    grid of queries and keys."""
    figure, (left, right) = subplots(1, 2, figsize=(9, 2.9), width_ratios=(2.5, 1))
    close(figure)
    for y, who, live in ((1.5, "an earlier\ntoken", STAGES[:2]), (0, "the last\ntoken", STAGES)):
        left.text(-0.15, y + 0.35, who, ha="right", va="center", fontsize=9)
        for x, stage in enumerate(STAGES):
            alive = stage in live
            left.add_patch(Rectangle((x, y), 0.8, 0.7, facecolor=GREEN if alive else "white",
                                     alpha=0.5 if alive else 1, edgecolor=BLACK if alive else "#999999",
                                     linestyle="-" if alive else ":"))
            left.text(x + 0.4, y + 0.35, stage, ha="center", va="center", fontsize=8,
                      color=BLACK if alive else "#888888")
    left.add_patch(FancyArrowPatch((1.5, 1.48), (3.4, 0.72), arrowstyle="->", mutation_scale=12, color=BLUE,
                                   linewidth=1.8))
    left.text(2.6, 1.17, "looked at", fontsize=8, color=BLUE)
    left.text(6.0, 0.35, "→ the draft", va="center", fontsize=9)
    left.text(6.0, 1.85, "→ nobody", va="center", fontsize=9, color="#888888")
    left.set(xlim=(-1.2, 7.2), ylim=(-0.3, 2.5))
    left.axis("off")
    left.set_title("Green: somebody reads what it makes", fontsize=10)
    attention_grid(right, tokens)
    return figure


def attention_grid(axes, tokens: int) -> None:
    """Who looks at whom: of all rows of the causal triangle, only the last is used."""
    for row in range(tokens):
        for column in range(row + 1):
            used = row == tokens - 1
            axes.add_patch(Rectangle((column, row), 1, 1, facecolor=BLUE if used else YELLOW, edgecolor="white",
                                     alpha=0.9 if used else 0.35, hatch="" if used else "//"))
    axes.set(xlim=(0, tokens), ylim=(tokens, 0), xticks=[], yticks=[], aspect="equal", xlabel="key, value of token",
             ylabel="query of token")
    axes.set_title("Attention: the last row is used", fontsize=10)
    axes.grid(visible=False)


def samples(times: dict[str, Sequence[float]], title: str) -> Figure:
    """Every sample of each recipe as a dot, the fastest as a line; milliseconds."""
    figure, axes = canvas(title, 7.4, 0.9 + 0.35 * len(times))
    for row, (name, seconds) in enumerate(times.items()):
        milliseconds = sorted(1e3 * second for second in seconds)
        axes.plot(milliseconds, [row] * len(milliseconds), "o", color=STYLES[name][0], markeredgecolor=BLACK,
                  markersize=6)
        axes.plot(milliseconds[:1] * 2, [row - 0.35, row + 0.35], color=BLACK, linewidth=2)
    axes.set(yticks=range(len(times)), yticklabels=list(times), xlabel="milliseconds (line: the fastest)")
    axes.set_xlim(left=0)
    axes.invert_yaxis()
    return figure


def pays(needs: Callable[[float], float], curves: dict[str, float]) -> Figure:
    """From how many generated tokens on drafts pay, against the prompt's length; curves: name -> its share lost."""
    figure, axes = canvas("Drafting pays above the line", 6, 2.8)
    lengths = [0, 1000, 2000, 4000, 8000]
    for (name, lost), style in zip(curves.items(), ("o-", "s--", "^-."), strict=False):
        axes.plot(lengths, [length * needs(lost) for length in lengths], style, label=name, color=STYLES[name][0])
    axes.set(xlabel="tokens of the prompt", ylabel="tokens of the answer")
    axes.legend(fontsize=8)
    return figure
