"""Pictures of chapter 01: a file byte by byte, a block unpacked, text cut into tokens, size against precision."""
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from minillama.gguf import GGUF
from minillama.show import BLACK, BLUE, GREEN, ORANGE, PURPLE, RED, SKY, YELLOW, canvas, logarithmic

PALETTE = (SKY, ORANGE, GREEN, YELLOW, PURPLE, RED, BLUE)
HATCHES = ("", "//", "..", "\\\\", "xx", "++", "--")
PARTS = {   # the first pattern that a tensor's name holds says to which part of the model it belongs
    "_exps": "routed experts", "_shexp": "shared experts", "token_embd": "embedding", "output.weight": "head",
    "ssm_": "Gated DeltaNet", "attn_qkv": "Gated DeltaNet", "attn_gate": "Gated DeltaNet", "ffn_gate_inp": "router",
    "norm": "norms", "attn_": "attention", "nextn": "MTP input"}


def byte_grid(raw: bytes, fields: Mapping[str, int], columns: int = 16) -> Figure:
    """Bytes as a grid, each in hexadecimal with its character below it, coloured by the field that it belongs to.

    A field's number stands where it begins. `fields` are (name, length in bytes) in the order of the file.
    """
    rows = -(-sum(fields.values()) // columns)
    figure, axes = canvas("The first bytes of the file", height=0.7 + 0.42 * rows)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    at = 0
    for place, length in enumerate(fields.values()):
        for byte in raw[at:at + length]:
            x, y = at % columns, at // columns
            axes.add_patch(Rectangle((x, y), 1, 1, facecolor=PALETTE[place % 7], alpha=0.45, edgecolor="white",
                                     hatch=("", "//")[place // 7]))
            axes.text(x + 0.5, y + 0.36, f"{byte:02x}", ha="center", va="center", fontsize=8, family="monospace")
            character = chr(byte) if 33 <= byte < 127 else "·"
            axes.text(x + 0.5, y + 0.77, character, ha="center", va="center", fontsize=7, color="#444444")
            at += 1
        row, column = divmod(at - length, columns)
        axes.text(column + 0.06, row + 0.06, str(place + 1), va="top", fontsize=7, fontweight="bold")
    handles = [Patch(facecolor=PALETTE[i % 7], alpha=0.45, hatch=("", "//")[i // 7], edgecolor="white",
                     label=f"{i + 1} {name}") for i, name in enumerate(fields)]
    figure.legend(handles=handles, loc="outside lower left", ncols=4, fontsize=8)
    return figure


def layout(regions: Mapping[str, tuple[int, int]], size: int) -> Figure:
    """A file as a bar from its first byte to its last; below it, the part before the tensors, enlarged.

    `regions` are name -> (start, end) in bytes; the last one holds the tensors.
    """
    figure, axes = canvas("The whole file, and what stands before the tensors", height=2.6)
    *before, last = regions
    head = regions[last][0]
    for row, (names, length) in enumerate(((list(regions), size), (before, head))):
        for place, name in enumerate(names):
            start, end = regions[name]
            colour, hatch = PALETTE[place % 7], HATCHES[place % 7]
            axes.barh(row, (end - start) / length, 0.55, start / length, color=colour, hatch=hatch, alpha=0.75,
                      edgecolor=BLACK, linewidth=0.5, label=f"{name}: {end - start:,} bytes" if row == 0 else None)
    for x, y in ((0, 0), (head / size, 1)):
        axes.plot([x, y], [0.28, 0.72], ":", color=BLACK, linewidth=1)
    axes.set(yticks=(0, 1), yticklabels=(f"all {size / 1e6:.1f} MB", f"the first {head / 1e3:.0f} kB"), xticks=())
    axes.invert_yaxis()
    axes.grid(visible=False)
    figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return figure


def parts(file: GGUF) -> Figure:
    """Bytes of each part of the model, as they lie in the file."""
    sums: dict[str, int] = defaultdict(int)
    for name, info in file.tensors.items():
        sums[next(part for pattern, part in PARTS.items() if pattern in name)] += info.nbytes
    names = sorted(sums, key=lambda name: -sums[name])
    figure, axes = canvas("Where the bytes are", height=0.9 + 0.3 * len(names))
    bars = axes.barh(names, [sums[name] / 1e6 for name in names], color=BLUE, height=0.7)
    axes.bar_label(bars, [f"{sums[n] / sum(sums.values()):.1%}" for n in names], padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("MB")
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.1)
    return figure


def q4_0_block(raw: np.ndarray) -> Figure:
    """The 18 bytes of a Q4_0 block: two of scale, sixteen of two values each, and the 32 whole numbers they hold."""
    nibbles = np.concatenate([raw[2:] & 15, raw[2:] >> 4]).astype(int)
    figure, axes = canvas("One block: 18 bytes, 32 values", height=3.4)
    axes.set(xlim=(-0.5, 32.5), ylim=(-2.4, 17.5), yticks=(0, 8, 15), yticklabels=("0", "8", "15"), xticks=())
    colours = [SKY] * 16 + [ORANGE] * 16
    axes.bar(range(32), nibbles - 8, 0.8, 8, color=colours, edgecolor=BLACK, linewidth=0.4,
             hatch=[""] * 16 + ["//"] * 16)
    axes.axhline(8, color=BLACK, linewidth=0.8)
    for i, byte in enumerate(raw[2:]):
        for x, digit, colour in ((i, byte & 15, SKY), (i + 16, byte >> 4, ORANGE)):
            axes.text(x, -1.4, f"{digit:x}", ha="center", va="center", fontsize=9, family="monospace",
                      bbox={"facecolor": colour, "alpha": 0.5, "pad": 1.5, "edgecolor": "none"})
    axes.text(-0.4, 16.2, "low halves of the 16 bytes: values 0–15", fontsize=9)
    axes.text(15.6, 16.2, "high halves: values 16–31", fontsize=9)
    axes.set_ylabel("quant (8 means zero)")
    axes.grid(axis="x", visible=False)
    return figure


def merges(steps: Sequence[Sequence[str]], title: str = "") -> Figure:
    """A word's pieces after each merge, from single bytes down to its tokens; the newest piece is marked."""
    figure, axes = canvas(title or "Merging a word, pair by pair", height=0.6 + 0.36 * len(steps))
    axes.axis("off")
    axes.set(xlim=(0, sum(map(len, steps[0]))), ylim=(len(steps), 0))
    for row, pieces in enumerate(steps):
        before = steps[row - 1] if row else pieces
        newest = next((i for i, pair in enumerate(zip(pieces, before, strict=False)) if pair[0] != pair[1]), -1)
        at = 0
        for place, piece in enumerate(pieces):
            new = place == newest
            axes.add_patch(Rectangle((at + 0.06, row + 0.1), len(piece) - 0.12, 0.8, edgecolor=BLACK, linewidth=0.8,
                                     facecolor=ORANGE if new else SKY, alpha=0.5, hatch="//" if new else ""))
            axes.text(at + len(piece) / 2, row + 0.52, piece, ha="center", va="center", family="monospace")
            at += len(piece)
    return figure


def tokens(pieces: Sequence[str], ids: Sequence[int], columns: int = 46) -> Figure:
    """Text with each token in a box of its own, its id below; spaces and line ends made visible."""
    boxes, x, row = [], 0, 0
    for piece, number in zip(pieces, ids, strict=True):
        shown = piece.replace(" ", "·").replace("\n", "⏎")
        width = max(len(shown), 0.62 * len(str(number))) + 0.5
        if x + width > columns:
            x, row = 0, row + 1
        boxes.append((x, row, width, shown, number))
        x, row = (0, row + 1) if "\n" in piece else (x + width, row)
    rows = max(box[1] for box in boxes) + 1
    figure, axes = canvas(f"{len(ids)} tokens", width=8, height=0.5 + 0.5 * rows)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    for place, (x, row, width, shown, number) in enumerate(boxes):
        axes.add_patch(Rectangle((x, row + 0.08), width - 0.15, 0.54, facecolor=(SKY, YELLOW)[place % 2], alpha=0.55,
                                 edgecolor=BLACK, linewidth=0.6))
        axes.text(x + width / 2 - 0.07, row + 0.36, shown, ha="center", va="center", family="monospace", fontsize=9)
        axes.text(x + width / 2 - 0.07, row + 0.82, str(number), ha="center", va="center", fontsize=7,
                  color="#444444")
    return figure


def precision(errors: Mapping[str, tuple[float, float]]) -> Figure:
    """Formats by (bits a value, relative error): what a bit buys. Plain floats and blocks have different marks."""
    figure, axes = canvas("Bits against error, one tensor", height=3.4)
    for name, (bits, error) in errors.items():
        plain = name.endswith("16")
        axes.plot(bits, error, "s" if plain else "o", color=ORANGE if plain else BLUE, markersize=7,
                  markeredgecolor=BLACK)
        beside, side = ((-7, -4), "right") if name.endswith("_0") and bits < 8 else ((7, 3), "left")
        axes.annotate(name, (bits, error), xytext=beside, textcoords="offset points", fontsize=9, ha=side)
    logarithmic(axes, "y")
    axes.set(xlabel="bits a value", ylabel="relative error", xlim=(3, 18))
    return figure


def quality(formats: Mapping[str, tuple[float, float]], floor: float) -> Figure:
    """Files by (megabytes, bits per byte of held-out text): lower is better, and so is further left.

    `floor`: bits per byte of the model as it was trained, drawn as a line.
    """
    figure, axes = canvas("Size against quality, the whole model", height=3.2)
    axes.axhline(floor, linestyle="--", color=BLACK, linewidth=1, label="as trained (F32)")
    for name, (size, bits) in formats.items():
        axes.plot(size, bits, "o", color=BLUE, markersize=7, markeredgecolor=BLACK)
        axes.annotate(name, (size, bits), xytext=(7, 4), textcoords="offset points", fontsize=9)
    axes.set(xlabel="MB", ylabel="bits per byte of Python")
    axes.margins(x=0.15, y=0.2)
    axes.legend()
    return figure
