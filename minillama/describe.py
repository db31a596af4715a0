"""What is in a model file, as tables: metadata, tensors, formats, parameters, memory. Reads the header only."""
from collections import defaultdict
from collections.abc import Iterator
from math import prod

from rich import box
from rich.table import Table
from rich.text import Text

from minillama.config import ModelConfig
from minillama.gguf import GGUF
from minillama.units import in_units

LONGEST = 120       # characters of a metadata value that are shown
CONTEXTS = (4096, 32768)
PADDING = 512       # the engine's largest batch: a padded one may overrun the context by so many positions
FLOAT = 4           # bytes: of a value of the state
HISTORY, SLOTS = 16, 2      # rows of a delta net's rings: its convolution's inputs, its memories


def table(title: str, *columns: str, left: int = 1, rows: Iterator[tuple]) -> Table:
    """A table whose first `left` columns are words and whose others are numbers. Cells are never read as markup."""
    made = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE)
    for i, column in enumerate(made.columns):
        column.justify, column.overflow, column.no_wrap = ("left" if i < left else "right"), "fold", i == 0
    for row in rows:
        made.add_row(*(Text(f"{cell:,}" if isinstance(cell, int) else cell) for cell in row))
    return made


def value_text(value) -> str:
    """A metadata value on one line: control characters escaped, long ones cut short with their length."""
    text = repr(value[:50]) if isinstance(value, list) else value if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
    kind = "entries" if isinstance(value, list) else "characters"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}… ({len(value):,} {kind})"


def metadata_table(file: GGUF) -> Table:
    """Key and value."""
    return table("Metadata", "key", "value", left=2,
                 rows=((value_text(key), value_text(value)) for key, value in file.metadata.items()))


def tensor_table(file: GGUF) -> Table:
    """Every tensor, in the order of the file: shapes are rows × columns."""
    return table("Tensors", "name", "format", "shape", "bytes", left=2,
                 rows=((value_text(name), t.format.name, " × ".join(map(str, t.shape)), t.nbytes)
                       for name, t in file.tensors.items()))


def format_table(file: GGUF) -> Table:
    """Block formats, by the bytes they take."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for tensor in file.tensors.values():
        for i, amount in enumerate((1, prod(tensor.shape), tensor.nbytes)):
            sums[tensor.format.name][i] += amount
    rows = [(name, *amounts, f"{8 * amounts[2] / amounts[1]:.4g}") for name, amounts in sums.items()]
    return table("Formats", "format", "tensors", "values", "bytes", "bits a value",
                 rows=sorted(rows, key=lambda row: -row[3]))


def part_of(name: str, config: ModelConfig) -> str:
    """The part of the model that a tensor belongs to."""
    if not name.startswith("blk."):
        return {"token_embd.weight": "embedding", "output.weight": "head"}.get(name, "norms")
    block, kind = int(name.split(".")[1]), name.split(".", 2)[2]
    if block >= config.layers:
        return "MTP block"
    if kind in ("attn_norm.weight", "post_attention_norm.weight"):
        return "norms"
    if kind.startswith("ffn_"):
        return "experts" if "_exps" in kind else "routers and shared experts"
    return "Gated DeltaNet" if config.recurrent[block] else "gated attention"


def parameters(file: GGUF, config: ModelConfig) -> dict[str, tuple[int, int]]:
    """Part → its parameters in all, and those that one generated token reads: of the experts the chosen ones, of the
    embedding one row (all of it where it is the head too), of the MTP block none."""
    sums: dict[str, int] = defaultdict(int)
    for name, tensor in file.tensors.items():
        sums[part_of(name, config)] += prod(tensor.shape)

    def active(part: str, count: int) -> int:
        if part == "experts":
            return count * config.experts_used // config.experts
        if part == "embedding" and "head" in sums:
            return config.hidden
        return 0 if part == "MTP block" else count
    return {part: (count, active(part, count)) for part, count in sums.items()}


def parameter_table(file: GGUF, config: ModelConfig) -> Table:
    """Parameters in all and active, by part and together."""
    parts = parameters(file, config)
    total, active = (sum(column) for column in zip(*parts.values(), strict=True))
    made = table("Parameters", "part", "in all", "active per token",
                 rows=((part, *counts) for part, counts in sorted(parts.items(), key=lambda item: -item[1][0])))
    made.add_section()
    made.add_row("all", f"{total:,}", f"{active:,}", style="bold")
    return made


def state_bytes(config: ModelConfig, context: int) -> int:
    """Bytes of the default recipe's state for one text: caches that grow with the context, rings that do not."""
    caches = config.recurrent.count(False) + config.mtp_blocks
    cache = 2 * (context + PADDING) * config.kv_heads * config.head_dim
    delta = HISTORY * config.conv_channels + SLOTS * config.v_heads * config.state_dim ** 2
    return FLOAT * (caches * cache + config.recurrent.count(True) * delta)


def device_bytes(file: GGUF) -> int:
    """Bytes of all weights on the device, packed."""
    return sum(tensor.format.device_bytes(tensor.shape) for tensor in file.tensors.values())


def memory_table(file: GGUF, config: ModelConfig, context: int | None) -> Table:
    """What the device must hold at a context, or at a few up to the model's longest."""
    lengths = [context] if context else sorted({min(length, config.context) for length in (*CONTEXTS, config.context)})
    stored = device_bytes(file)
    rows = ((length, *(in_units(amount, "B") for amount in (stored, state, stored + state)))
            for length in lengths for state in [state_bytes(config, length)])
    return table("Memory", "context", "weights", "state", "together", left=0, rows=rows)
