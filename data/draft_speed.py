"""What multi-token prediction costs and gains, in speed alone: generation with drafts, and prompts by three recipes.

    python data/draft_speed.py --shape qwen3-next-80b-a3b      random weights in the shapes of a real model
    python data/draft_speed.py                                 the shipped model
    writes data/results/mtp-<model>-<device>.json; what that holds and this run does not measure stays in it

Drafts are kept by chance, with probability P at each place: what is measured is the time of what runs. Prompts are run
as a whole; what the recipe `logits` copies to the host, and what `hidden` would copy there, is timed apart.
"""
import argparse
import gc
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
from tinygrad import Tensor
from tinygrad.helpers import GlobalCounters

from minillama.bench import Bench, Trial
from minillama.config import ModelConfig
from minillama.engine import Engine
from minillama.gguf import GGUF
from minillama.layers import linear
from minillama.measure import Counts, calls_of, synchronize
from minillama.model import forward, place_of
from minillama.recipe import CHOICES, Recipe
from minillama.results import Model, Result, Row, beside_stored, write_result
from minillama.shapes import model_name, random_weights, shape_config
from minillama.weights import ModelWeights, load_weights

SHIPPED = Path(__file__).parent / "minillama-coder-Q8_0.gguf"
VALUES = {"base": 0, "last": 0, "start": 0}


def timed(run: Callable[[], object], repeats: int) -> list[int]:
    """Nanoseconds of each call, after one that is not timed."""
    samples = []
    for _ in range(repeats + 1):
        synchronize()
        began = time.perf_counter_ns()
        run()
        synchronize()
        samples.append(time.perf_counter_ns() - began)
    return samples[1:]


def counted(engine: Engine, key: tuple[str, int]) -> Counts:
    return Counts.of(calls_of(engine.steps[key], values=VALUES | {"valid": key[1]}))


def say(row: Row) -> Row:
    speed = row.tokens / median(row.samples_ns) * 1e9
    print(f"{row.name:<34}{speed:>10,.1f} tokens/s  {row.counts or ''} {row.values}", flush=True)
    return row


# ---- generation ---------------------------------------------------------------------------------------------------


def generation(engine: Engine, count: int, length: int, chances: list[float | None], repeats: int) -> list[Row]:
    """tg of an engine: plain, or with so many drafts at each chance of keeping one."""
    rows = []
    for chance in chances:
        bench = Bench(engine, chance, length)
        samples, _ = bench.run(Trial(0, count), repeats)
        name = f"tg{count}" + (f" draft={length} accept={chance:g}" if length else "")
        key = ("round simulated", length) if length else ("logits", 1)
        values = {"accept": chance, "kept": bench.accepted / bench.rounds} if length else {}
        recipe = replace(engine.recipe, draft=length).names()
        rows.append(say(Row(name, recipe, count, samples, counts=counted(engine, key), simulated=bool(length),
                            values=values)))
    return rows


def verification(engine: Engine, length: int, repeats: int) -> Row:
    """The model's look at `length` + 1 tokens alone, by name "verify": what a round costs beside its drafts."""
    ids = Tensor([1] * (length + 1), dtype="int32", device=engine.device).realize()

    def run(ids: Tensor, start) -> Tensor:
        e, at = engine, place_of(ids, start, None)
        return linear(forward(ids, e.weights, e.config, e.recipe, e.state, e.table, at), e.weights.head).realize()
    samples = timed(lambda: engine.call(("verify", length + 1), run, ids, engine.start.bind(8)), repeats)
    return say(Row(f"verify {length + 1}", engine.recipe.names(), length + 1, samples,
                   counts=counted(engine, ("verify", length + 1))))


# ---- prompts ------------------------------------------------------------------------------------------------------


def prompts(engine: Engine, lengths: list[int], repeats: int, before: int) -> list[Row]:
    """pp of an engine, and what its largest batch counts, copies and occupies (bytes beside those `before`)."""
    rows, bench, name = [], Bench(engine), engine.recipe.mtp_prefill if engine.recipe.draft else "without"
    batch = engine.batches[0]
    for tokens in lengths:
        samples, _ = bench.run(Trial(tokens, 0), repeats)
        every = sum(out.nbytes() for out in engine.outputs)
        values = {"bytes_to_host": float(every * max(1, tokens // batch)),
                  "bytes_beside_weights": float(GlobalCounters.mem_used - before)}
        rows.append(say(Row(f"pp{tokens} {name}", engine.recipe.names(), tokens, samples,
                            counts=counted(engine, ("logits", min(batch, tokens))), values=values)))
    for out in engine.outputs:
        rows.append(say(Row(f"copy of {batch} logits", tokens=batch, samples_ns=timed(out.numpy, repeats))))
    if engine.recipe.draft and engine.recipe.mtp_prefill == "hidden":
        states = Tensor(np.zeros((batch, engine.config.hidden), dtype=np.float32), device=engine.device).realize()
        rows.append(say(Row(f"copy of {batch} hidden states", tokens=batch, samples_ns=timed(states.numpy, repeats))))
    return rows


def in_order(row: Row) -> tuple:
    """Where a row stands in the file: generation, its parts, prompts by recipe and length, copies."""
    kinds, (kind, *rest) = ("tg", "verify", "pp", "copy"), row.name.split()
    recipes = ["without", *reversed(CHOICES["mtp_prefill"])]
    return (next(n for n, start in enumerate(kinds) if kind.startswith(start)),
            recipes.index(rest[0]) if kind.startswith("pp") else 0, row.tokens, row.name)


def read_model(args: argparse.Namespace) -> tuple[ModelWeights, ModelConfig, Model]:
    if args.shape:
        config = shape_config(args.shape, args.layers, mtp=True)
        model = Model(model_name(args.shape, config.layers), "Q4_0", config.layers)
        return random_weights(config, "Q4_0", True, True), config, model
    file = GGUF(SHIPPED)
    config = ModelConfig.from_gguf(file)
    return load_weights(file, config, True, True), config, Model(config.name, "Q8_0", config.layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape")
    parser.add_argument("--layers", type=int)
    parser.add_argument("-n", type=int, default=128, help="tokens to generate")
    parser.add_argument("-p", default="512,2048", help="lengths of prompts")
    parser.add_argument("--drafts", default="1,2,3")
    parser.add_argument("--recipes", default=",".join(["without", *reversed(CHOICES["mtp_prefill"])]))
    parser.add_argument("--no-verify", action="store_true", help="leave out the model's look at drafts alone")
    parser.add_argument("-r", type=int, default=5)
    args = parser.parse_args()
    weights, config, model = read_model(args)
    lengths, rows = [int(part) for part in args.p.split(",")], []
    before = GlobalCounters.mem_used

    def engine(**changes) -> Engine:
        gc.collect()
        return Engine(weights, config, replace(Recipe(), **changes), context=max(lengths) + args.n)

    def save() -> None:
        result = beside_stored(Result.here("mtp", model, rows))
        write_result(replace(result, rows=sorted(result.rows, key=in_order)), local=False)
    drafts = [int(part) for part in args.drafts.split(",") if part]
    if drafts:
        rows += generation(engine(), args.n, 0, [None], args.r)
        made = engine(draft=max(drafts))
        for count in drafts:
            rows += generation(made, args.n, count, [0.8, 0.0], args.r)
            rows += [] if args.no_verify else [verification(made, count, args.r)]
            save()
        del made
    for recipe in args.recipes.split(","):
        made = engine() if recipe == "without" else engine(draft=1, mtp_prefill=recipe)
        rows += prompts(made, lengths, args.r, before)
        save()
        del made


if __name__ == "__main__":
    main()
