"""Pictures of chapter 13: tokens sorted by expert into tiles, what tiles cost, what a tensor core multiplies, and
where our prompts stand."""
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.pyplot import close, subplots
from tinygrad import Tensor, dtypes
from tinygrad.codegen import to_program
from tinygrad.uop.ops import KernelInfo, Ops

from minillama.kernels.rendering import renderer
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, logarithmic

COLOURS = (SKY, ORANGE, GREEN, YELLOW, PURPLE, RED, BLUE, "#BBBBBB")
HATCHES = ("", "//", "..", "\\\\", "xx", "++", "--", "oo")


def _box(axes, x: float, y: float, expert: int | None, text: str) -> None:
    colour, hatch = ("white", "") if expert is None else (COLOURS[expert % 8], HATCHES[expert % 8])
    axes.add_patch(Rectangle((x + 0.05, y + 0.08), 0.9, 0.84, facecolor=colour, hatch=hatch, alpha=0.55,
                             edgecolor="#888888", linewidth=0.8))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8)


def tiles(ids: np.ndarray, rows: np.ndarray, owners: np.ndarray, tile: int) -> Figure:
    """Left, who was picked: a row a token, a box a choice. Right, the same choices sorted into tiles: a column a tile,
    its boxes the tokens; white is padding. ids (tokens, used); rows (tiles * tile,); owners (tiles,)."""
    tokens, used = ids.shape
    count = max(np.flatnonzero(rows >= 0)) // tile + 1                      # tiles that hold anything
    figure, axes = canvas("Tokens and the experts they picked; the same, sorted into tiles", 8.4,
                          0.7 + 0.24 * max(tokens, tile + 2))
    for token, picked in enumerate(ids):
        axes.text(-0.2, token + 0.5, f"token {token}", ha="right", va="center", fontsize=8)
        for place, expert in enumerate(picked):
            _box(axes, place, token, int(expert), f"{expert}")
    for t in range(count):
        x = used + 2 + t * 1.25
        axes.text(x + 0.5, 0.3, f"expert\n{owners[t]}", ha="center", va="center", fontsize=8)
        for row in range(tile):
            assignment = int(rows[t * tile + row])
            _box(axes, x, row + 1, int(owners[t]) if assignment >= 0 else None,
                 f"{assignment // used}" if assignment >= 0 else "")
    axes.set(xlim=(-1.6, used + 2.2 + count * 1.25), ylim=(max(tokens, tile + 1) + 0.1, -0.4))
    axes.axis("off")
    return figure


def loads(routings: Mapping[str, np.ndarray], experts: int, tile: int) -> Figure:
    """How many choices each expert has under several routings, one panel each; the tiles it needs as steps around."""
    figure, axes = subplots(1, len(routings), sharey=True, figsize=(8.4, 2.4), squeeze=False)
    close(figure)
    for place, (name, ids) in zip(axes[0], routings.items(), strict=True):
        counts = np.bincount(ids.reshape(-1), minlength=experts)
        needed = -(-counts // tile)
        place.bar(range(experts), needed * tile, 1.0, color="white", edgecolor=ORANGE, hatch="////", linewidth=0.8,
                  label="padding")
        place.bar(range(experts), counts, 0.8, color=BLUE, label="choices")
        place.set_title(f"{name}: {needed.sum()} tiles", fontsize=10)
        place.set_xlabel("expert")
        place.grid(axis="x", visible=False)
    axes[0, 0].set_ylabel("rows")
    axes[0, -1].legend(fontsize=8)
    return figure


def cores(a: tuple[int, int], b: tuple[int, int]) -> Figure:
    """One instruction of a tensor core: c += a · b, small matrices of halves, a sum of floats."""
    (m, k), n = a, b[1]
    figure, axes = canvas(f"One instruction: {m} × {n} sums, {m * n * k:,} multiplications", 6.4, 2.6)
    axes.axis("off")
    parts = (("c", m, n, "float32", GREEN, ".."), ("c", m, n, "float32", GREEN, ".."), ("a", m, k, "half", SKY, ""),
             ("b", k, n, "half", ORANGE, "//"))
    x, signs = 0.0, ("=", "+", "·", "")
    for (name, rows, columns, kind, colour, hatch), sign in zip(parts, signs, strict=True):
        axes.add_patch(Rectangle((x, -rows / 2), columns, rows, facecolor=colour, hatch=hatch, alpha=0.5,
                                 edgecolor=BLACK))
        axes.text(x + columns / 2, 0, f"{name}\n{rows} × {columns}\n{kind}", ha="center", va="center", fontsize=9,
                  bbox={"facecolor": "white", "alpha": 0.7, "edgecolor": "none", "pad": 1})
        axes.text(x + columns + 2, 0, sign, ha="center", va="center", fontsize=14)
        x += columns + 4
    axes.set(xlim=(-1, x - 2), ylim=(-m / 2 - 1, m / 2 + 1), aspect="equal")
    return figure


def core_lines(backend: str, words: Sequence[str]) -> list[str]:
    """Lines with one of `words` in the source of a product of halves (64 × 64, 512 terms) for "CUDA" or "METAL", whose
    matrix units tinygrad may use."""
    language = renderer(backend)
    a, b = (Tensor.empty(64, 512, dtype=dtypes.half, device="CPU") for _ in range(2))
    kernels = [call.src[0] for call in a.matmul(b.T, dtype=dtypes.float32).schedule_linear().src]
    tree = next(kernel for kernel in kernels if kernel.op is Ops.SINK)
    program = to_program(tree if tree.arg else tree.replace(arg=KernelInfo()), language)
    source = next(part.arg for part in program.src if part.op is Ops.SOURCE)
    return [line.strip() for line in source.splitlines() if any(word in line for word in words)]


def standing(ours: Mapping[str, Mapping[str, float]], theirs: Mapping[str, tuple[float, float]],
             limits: Mapping[str, float]) -> Figure:
    """Tokens a second of each test: ours as bars, up to three stages by name, and theirs as ranges; `limits` as lines
    over all of it, named above."""
    figure, axes = canvas("Tokens a second, 80B shapes, one H100", 8, 1.6 + 0.95 * len(theirs))
    for row, (name, (low, high)) in enumerate(theirs.items()):
        bars = [(f"minillama, {stage}", speeds[name], colour, "")
                for (stage, speeds), colour in zip(ours.items(), (SKY, GREEN, BLUE), strict=False)]
        bars.append(("llama.cpp b11434", high, ORANGE, "//"))
        for place, (label, speed, colour, hatch) in enumerate(bars):
            at = row + 0.22 * (place - (len(bars) - 1) / 2)
            axes.barh(at, speed, 0.2, color=colour, hatch=hatch, edgecolor="white", label=None if row else label)
            text = f"{low:,.0f}–{high:,.0f}" if hatch and low < high else f"{speed:,.0f}"
            axes.text(speed * 1.05, at, text, va="center", fontsize=8)
    for (name, value), style in zip(limits.items(), ("--", ":", "-."), strict=False):
        axes.axvline(value, linestyle=style, color=BLACK, linewidth=1.2, label=f"{name}: {value:,.0f}")
    axes.set(yticks=range(len(theirs)), yticklabels=list(theirs))
    logarithmic(axes, "x")
    axes.set_xlim(100, 2 * max(limits.values()))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure


def stages(count: int = 5) -> Figure:
    """A kernel's stages over time, with copies that a block waits for and with copies that are under way meanwhile."""
    figure, axes = canvas("One block of threads, stage by stage (not to scale)", 8.4, 2.6)
    copy, work = 1.0, 1.2
    rows = ("each copy\nwaited for", copy + work), ("the next copy\nunder way", work)
    for place, (top, period) in enumerate(rows):
        for n in range(count):
            begin = n * period
            work_at, copy_at = begin + copy, begin if place == 0 or n == 0 else begin + copy - period
            for at, size, y, colour, hatch in ((copy_at, copy, 0.1, ORANGE, "//"), (work_at, work, 0.5, BLUE, "")):
                axes.add_patch(Rectangle((at, place * 1.3 + y), size, 0.36, facecolor=colour, hatch=hatch, alpha=0.6,
                                         edgecolor="white"))
                axes.text(at + size / 2, place * 1.3 + y + 0.18, f"{n + 1}", ha="center", va="center", fontsize=8)
        axes.text(-0.15, place * 1.3 + 0.48, top, ha="right", va="center", fontsize=9)
    for label, colour, hatch in (("copy a stage into shared memory", ORANGE, "//"), ("multiply a stage", BLUE, "")):
        axes.add_patch(Rectangle((0, 9), 1, 1, facecolor=colour, hatch=hatch, alpha=0.6, label=label))
    axes.set(xlim=(-2.4, count * 2.2 + 0.2), ylim=(2.5, -0.1))
    axes.axis("off")
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure


def register_block(tokens: int = 4, rows: int = 12, columns: int = 9, at: int = 3) -> Figure:
    """A product as a core does it: x at the left, a panel of weights above, a block of sums between them. Coloured is
    what one turn of the loop over columns touches."""
    figure, axes = canvas(f"One turn: {tokens} + {rows} loads, {tokens} × {rows} products", 6.4, 4.4)
    gap = 0.8
    for left, top, wide, high, colour, hit in (
            (0, columns + gap, columns, tokens, ORANGE, lambda row, column: column == at),
            (columns + gap, 0, rows, columns, BLUE, lambda row, column: row == at),
            (columns + gap, columns + gap, rows, tokens, GREEN, lambda row, column: True)):
        for row in range(high):
            for column in range(wide):
                axes.add_patch(Rectangle((left + column + 0.06, top + row + 0.06), 0.88, 0.88, edgecolor="#BBBBBB",
                                         linewidth=0.6, facecolor=colour if hit(row, column) else "white", alpha=0.6))
    for x, y, text in ((columns / 2, columns + gap + tokens + 0.5, "x: tokens × columns"),
                       (columns + gap + rows / 2, -0.5, "the panel: columns × rows of weights, unpacked"),
                       (columns + gap + rows / 2, columns + gap + tokens + 0.5, "sums, in registers")):
        axes.text(x, y, text, ha="center", va="center", fontsize=9)
    axes.text(at + 0.5, columns + 0.25, "column k", ha="center", va="center", fontsize=8)
    axes.text(columns + 0.5, at + 0.5, "k", ha="center", va="center", fontsize=8)
    axes.set(xlim=(-0.5, columns + gap + rows + 0.5), ylim=(columns + gap + tokens + 1.2, -1.2), aspect="equal")
    axes.axis("off")
    return figure
