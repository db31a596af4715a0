"""What one step of a real model costs, counted without a GPU and without weights.

On tinygrad's NULL device a step is built and captured as on any other, but nothing is stored or run: the 80B model can
be counted on a laptop. Each kind of layer is captured once and multiplied; what comes before and after the layers is
the rest of a model with one layer of each kind.

Counted is what each kernel says it touches: every buffer once per kernel, at most its size, however often a kernel
comes back to it. A batch of 512 tokens that gathers 10 experts each reads 5,120 expert matrices; counted are the 512
that there are, as if a cache held whatever is read again. *Ideal* stands beside it: each weight once (of the experts
those that can have been picked), each state read and written once, each logit written, and nothing in between.

Kernels are those of a CPU, unless a backend is named: where threads share memory and multiply on tensor cores, other
kernels run, and fewer.

With an MTP block, a batch counts what `mtp_prefill` runs of it, and one token counts the block in full: a draft.
"""
from collections import Counter
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import astuple, dataclass, replace

from rich import box
from rich.table import Table
from tinygrad import Context, Tensor, TinyJit, UOp, dtypes

from minillama.config import ModelConfig
from minillama.engine import Engine
from minillama.kernels.rendering import acting_as
from minillama.layers import linear
from minillama.marks import Marks, Part
from minillama.measure import Call, Counts
from minillama.model import Place, forward_mtp, norm_of, run_layer
from minillama.mtp import kv_rows, remember_tokens
from minillama.recipe import Recipe
from minillama.results import read_results
from minillama.roofline import Roofline, from_result
from minillama.shapes import RandomWeights, check_format, unfilled
from minillama.state import KVChain, after
from minillama.units import in_units

NAMES = {True: "Gated DeltaNet", False: "gated attention"}


@dataclass(frozen=True)
class Group:
    """Parts that occur together, `times` over."""
    name: str
    times: int
    parts: tuple[Part, ...]

    @property
    def counts(self) -> Counts:
        total = sum((part.counts for part in self.parts), Counts())
        return Counts(*(value * self.times for value in astuple(total)))


# ---- what is captured ---------------------------------------------------------------------------------------------


def one_of_each(config: ModelConfig) -> ModelConfig:
    """A model with one layer of each kind that there is."""
    kinds = tuple(sorted(set(config.recurrent), reverse=True))
    return replace(config, layers=len(kinds), recurrent=kinds)


def captured(run, *args) -> TinyJit:
    replay = TinyJit(run)
    replay.cnt = 1          # capture at the first call
    replay(*args)
    return replay


def count_layer(engine: Engine, index: int, tokens: int, depth: int) -> tuple[Part, ...]:
    """One layer alone, as the model calls it."""
    w, part = engine.weights.layers[index], engine.state.layers[index]

    def run(x: Tensor, start: UOp, valid: UOp | None, position: Tensor, end: Tensor) -> Tensor:
        at = Place(tokens, start, valid, position, end)
        return run_layer(x, w, engine.config, engine.recipe, part, engine.table, at).contiguous().realize()
    replay = captured(run, Tensor.empty(tokens, engine.config.hidden).realize(), *bound(engine, tokens, depth))
    return tuple(Marks(engine.config, tokens, depth).layer(w, part).parts(replay))


def count_mtp(engine: Engine, tokens: int, depth: int) -> tuple[Part, ...]:
    """The MTP block on a batch whose hidden states are there. One token: a draft, with its logits. More: a prompt's
    part, by the recipe, which needs none."""
    w, c, recipe, state = engine.weights, engine.config, engine.recipe, engine.state.mtp
    kv = kv_rows(w.mtp.layer.mixer, c) if tokens > 1 and recipe.mtp_prefill == "kv" else ()

    def run(ids: Tensor, hidden: Tensor, start: UOp, valid: UOp | None, position: Tensor, end: Tensor) -> Tensor:
        at = Place(tokens, start, valid, position, end)
        if kv:
            cache = KVChain(*state.tensors())
            remember_tokens(ids, hidden, w.mtp, kv, c, engine.table, at, cache, norm_of(recipe))
            return after(position, cache.keys, cache.values).realize()
        out = forward_mtp(ids, hidden, w, c, recipe, state, engine.table, at)
        return (linear(out, w.mtp.head) if tokens == 1 else after(out)).realize()
    inputs = (Tensor.empty(tokens, dtype=dtypes.int32), Tensor.empty(tokens, c.hidden))
    replay = captured(run, *(tensor.realize() for tensor in inputs), *bound(engine, tokens, depth))
    marks = Marks(c, tokens, depth, int(tokens == 1))
    return tuple((marks.mtp_keys(w.mtp, kv, state) if kv else marks.mtp(w.mtp, state)).parts(replay))


def to_host(config: ModelConfig, recipe: Recipe, tokens: int) -> int:
    """Bytes that a step sends to the host: logits of all tokens, as llama.cpp before #23198, or one token id."""
    every = config.mtp_blocks and tokens > 1 and recipe.mtp_prefill == "logits"
    return tokens * config.vocab * 4 if every else 4


def count_ends(engine: Engine, layers: list[Group], tokens: int, depth: int) -> tuple[Part, ...]:
    """What a step of the small model runs beside its layers: embedding, last norm and head."""
    ids = Tensor.empty(tokens, dtype=dtypes.int32).realize()
    engine.step("logits", ids, depth, tokens)
    marks = Marks(engine.config, tokens, depth, tokens if engine.recipe.logits == "all" else 1)
    marks.ends(engine.weights.embed, engine.weights.head)
    marks.weight("norm", "norm", engine.weights.out_norm)

    def nameless(calls: Iterable[Call]) -> Counter[Call]:
        return Counter(replace(call, name="") for call in calls)
    inside = nameless(call for group in layers for part in group.parts for call in part.calls)
    found = {part.name: part for part in marks.parts(engine.steps["logits", tokens])}
    rest = nameless(call for name, part in found.items() if name not in ("embedding", "head") for call in part.calls)
    if inside - rest:
        raise RuntimeError(f"layers run other kernels in a model than alone: {list(inside - rest)[:3]}")
    return found["embedding"], replace(found["norm"], calls=tuple((rest - inside).elements())), found["head"]


def bound(engine: Engine, tokens: int, depth: int) -> tuple[UOp | Tensor | None, ...]:
    """The place of a step: its first position and how many of its tokens are text (None: all, always) as variables,
    then as tensors its first position and the one behind it, which a step makes once for all layers."""
    valid = UOp.variable("valid", 1, tokens).bind(tokens) if tokens > 1 else None
    return engine.start.bind(depth), valid, *(Tensor.empty(1, dtype=dtypes.int32).realize() for _ in range(2))


def count_step(config: ModelConfig, recipe: Recipe, format: str, tokens: int, depth: int = 0,
               backend: str = "") -> list[Group]:
    """Count one step of `tokens` tokens at position `depth`: each kind of layer, the ends, the MTP block; with the
    kernels of a `backend` ("CUDA", "METAL", "CL"), which take far longer to build, or by default with those of a CPU.

    Raises ValueError for what the model has no room for, or no batches of.
    """
    if depth + tokens > config.context:
        raise ValueError(f"{depth + tokens} tokens do not fit into the model's context of {config.context}")
    with Context(DEV="NULL", JIT=2), acting_as(backend) if backend else nullcontext():      # JIT=2: calls one by one
        small, recipe = one_of_each(config), replace(recipe, capture="jit", draft=0)
        if to_host(config, recipe, tokens) > 4:
            recipe = replace(recipe, logits="all")
        packed = recipe.weights == "packed"
        weights = RandomWeights(small, check_format(format, packed, mixes=()), recipe.projections == "fused", packed,
                                unfilled()).model()
        engine = Engine(weights, small, recipe, context=depth + tokens, batches=(tokens,))
        groups = [Group(NAMES[kind], config.recurrent.count(kind), count_layer(engine, index, tokens, depth))
                  for index, kind in enumerate(small.recurrent)]
        ends = Group("embedding and head", 1, count_ends(engine, groups, tokens, depth))
        mtp = [Group("MTP block", 1, count_mtp(engine, tokens, depth))] if config.mtp_blocks else []
        return [*groups, ends, *mtp]


def total(groups: list[Group]) -> Counts:
    """All of a step."""
    return sum((group.counts for group in groups), Counts())


# ---- for people and programs --------------------------------------------------------------------------------------


def ideal(groups: list[Group]) -> tuple[int, int]:
    """Bytes and operations of a step that wastes nothing."""
    parts = [(group.times, part) for group in groups for part in group.parts]
    return sum(times * p.ideal_bytes for times, p in parts), sum(times * p.ideal_ops for times, p in parts)


def seconds(groups: list[Group], roof: Roofline) -> float:
    """The least time of all kernels, one after the other."""
    return sum(group.times * part.seconds(roof) for group in groups for part in group.parts)


def as_table(title: str, groups: list[Group], roof: Roofline | None) -> Table:
    """A step as a table for rich to print; without a roofline it has no times."""
    columns = ["kernels", "copies", "bytes", "ideal", "operations"] + ["time"] * (roof is not None)
    table = Table("part", *columns, title=title, title_justify="left", box=box.SIMPLE,
                  show_edge=False, padding=(0, 0, 0, 1))
    table.columns[0].no_wrap = True
    for column in table.columns[1:]:
        column.justify = "right"

    def add(name: str, counts: Counts, bytes: int, least: float, style: str = "", end: bool = False) -> None:
        times = [in_units(least, "s")] if roof else []
        table.add_row(name, f"{counts.kernels:,}", f"{counts.copies:,}", in_units(counts.bytes, "B"),
                      in_units(bytes, "B"), in_units(counts.ops, ""), *times, style=style, end_section=end)
    for group in groups:
        bytes, _ = ideal([group])
        add(f"{group.times} × {group.name}", group.counts, bytes,
            seconds([group], roof) if roof else 0, "bold")
        for part in group.parts:
            many = Group(part.name, group.times, (part,))
            add("  " + part.name, many.counts, group.times * part.ideal_bytes,
                seconds([many], roof) if roof else 0, end=part is group.parts[-1])
    add("total", total(groups), ideal(groups)[0], seconds(groups, roof) if roof else 0, "bold")
    return table


def as_record(groups: list[Group], roof: Roofline | None) -> dict:
    """A step for JSON. Figures of a part are of one layer; the total's are of the whole model."""
    def figures(counts: Counts, bytes: int, ops: int, least: float | None) -> dict:
        return vars(counts) | {"ideal_bytes": bytes, "ideal_ops": ops, "seconds": least}
    return {"total": figures(total(groups), *ideal(groups), seconds(groups, roof) if roof else None),
            "groups": [{"name": group.name, "times": group.times, "parts": {
                part.name: figures(part.counts, part.ideal_bytes, part.ideal_ops, part.seconds(roof) if roof else None)
                for part in group.parts}} for group in groups]}


def roof_for(bandwidth: float | None, speed: float | None) -> tuple[Roofline | None, str]:
    """The roofline asked for (GB/s, TFLOP/s), what is left open taken from the GPU whose measured roofline lies in
    data/results/ (speed: in half precision); None if there is none. Also returns where it comes from."""
    stored = [result for result in read_results("roofline", local=False) if result.device.backend == "CUDA"]
    if stored:
        roof = from_result(stored[0])
        source = f"tinygrad's plain copy and product, as measured on an {stored[0].device.name}"
        roof = replace(roof, speed=roof.half_speed)
    elif bandwidth and speed:
        roof, source = Roofline("given", 0.0, 0.0, 0.0, 0.0, 0.0), ""
    else:
        return None, ""
    if bandwidth or speed:
        source = "as given" if bandwidth and speed else f"as given, else {source}"
        roof = replace(roof, bandwidth=(bandwidth or roof.bandwidth / 1e9) * 1e9,
                       speed=(speed or roof.speed / 1e12) * 1e12, launch=0.0)
    return roof, source


def limits(roof: Roofline) -> str:
    """A roofline in words."""
    launch = f" and {in_units(roof.launch, 's')} a launch" if roof.launch else ""
    return f"{in_units(roof.bandwidth, 'B/s')}, {in_units(roof.speed, 'FLOP/s')}{launch}"


def summary(groups: list[Group], tokens: int, roof: Roofline | None) -> list[str]:
    """What a roofline makes of a step: of its kernels, and of what would do. (The MTP block is in it, if counted.)"""
    if roof is None:
        return []
    bytes, ops = ideal(groups)
    kernels, least = seconds(groups, roof), roof.seconds(bytes, ops)
    return [f"these kernels: {in_units(kernels, 's')}, {tokens / kernels:,.0f} tokens/s; ideal bytes and operations: "
            f"{in_units(least, 's')}, {tokens / least:,.0f} tokens/s"]
