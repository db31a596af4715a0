"""Measuring the ladder: each recipe in a process of its own, all of them there and back, one result file.

A prompt batch (`pp`) and a decode step (`tg`) of each recipe: samples of their time, the three clocks of one more
call, and what they count. The recurrence makes a graph that grows with the prompt, so its recipes get a short one:
compare times per token.
"""
import json
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter_ns

import numpy as np
from tinygrad import Tensor

from minillama.config import ModelConfig
from minillama.engine import Engine
from minillama.gguf import GGUF
from minillama.ladder import LADDER, NAIVE, ablations
from minillama.measure import Clocks, Counts, calls_of, synchronize, time_call
from minillama.quantize import file_format
from minillama.recipe import Recipe
from minillama.results import ClockTimes, Model, Result, Row, read_result, write_result
from minillama.shapes import check_format, model_name, random_weights, shape_config

TEXT = "def fibonacci(n):\n"         # drafts are made for a real text: of a random one, few are kept
SHORT, LONG = 8, 64                 # tokens of a prompt: for the recurrence, and for the chunks
FEW = 2                             # samples of a recipe that builds its graph every time
GRID = ("pp1", "pp8", "pp512", "pp2048", "tg32")        # the tests that #19375 published
CONTEXT = 2048
SHIPPED = Path(__file__).parent.parent / "data" / "minillama-coder-Q8_0.gguf"


@dataclass(frozen=True)
class Subject:
    """What is measured: a file, or random weights in a real model's shapes (all layers, or so many)."""
    file: str = ""
    shape: str = ""
    format: str = "Q4_0"
    layers: int | None = None

    def model(self) -> Model:
        """What the result file says. Raises ValueError for an unknown shape or format."""
        if self.file:
            file = GGUF(self.file)
            config = ModelConfig.from_gguf(file)
            return Model(config.name, file_format(file), config.layers)
        layers = shape_config(self.shape, self.layers).layers
        return Model(model_name(self.shape, layers), check_format(self.format, packed=True), layers)

    def engine(self, recipe: Recipe) -> Engine:
        if self.file:
            return Engine.load(self.file, recipe, context=CONTEXT)
        config = shape_config(self.shape, self.layers, recipe.draft > 0)
        fused, packed = recipe.projections == "fused", recipe.weights == "packed"
        return Engine(random_weights(config, self.format, fused, packed), config, recipe, context=CONTEXT)


def measure_test(engine: Engine, name: str, test: str, repeats: int) -> Row:
    """One test, named as llama-bench names it: "pp64", a prompt of 64 tokens; "tg32", 32 tokens one by one."""
    eager, tokens = engine.recipe.capture == "eager", int(test[2:])
    prompt = np.random.default_rng(0).integers(0, engine.config.vocab, tokens).astype(np.int32)
    sizes = [1] * tokens if test.startswith("tg") else engine.plan(tokens)
    batches = [Tensor(part, device=engine.device).realize() for part in np.split(prompt, np.cumsum(sizes)[:-1])]
    starts = [int(at) for at in np.cumsum([0, *sizes[:-1]])]

    def call() -> None:
        for ids, start in zip(batches, starts, strict=True):
            engine.step("logits", ids, start, ids.shape[0]).realize()
    engine.clear()
    timing = time_call(call, repeats=min(repeats, FEW) if eager else repeats, warmup=1)    # captures, or compiles
    with Clocks() as clocks:
        call()
    counts = clocks.counts if eager else sum(
        (Counts.of(calls_of(engine.steps["logits", size], values={"start": start, "valid": size}))
         for size, start in zip(sizes, starts, strict=True)), Counts())
    times = ClockTimes(clocks.build, clocks.compile, clocks.run)
    return Row(f"{name} {test}", engine.recipe.names(), tokens, list(timing.samples_ns), times, counts)


def measure_drafts(engine: Engine, name: str, test: str, repeats: int) -> Row:
    """The same with drafts: a prompt together with what the MTP block runs for it, or the greedy rounds of a text that
    give that many tokens or a few more, all drafts in every round."""
    tokens, drafter, samples = int(test[2:]), engine.drafter, []
    prompt = np.random.default_rng(0).integers(0, engine.config.vocab, tokens).tolist()

    def rewind() -> int:
        engine.clear()
        return int(engine.feed(engine.tokenizer.encode(TEXT), "greedy").item()) if test.startswith("tg") else 0

    def call(token: int | None) -> list[tuple[int, int]]:
        """What was run, as values of the graph's variables: (base, last) of each round."""
        if test.startswith("pp"):
            engine.feed(prompt).realize()
            return []
        done, ran = 0, []
        while done < tokens:
            ran.append((drafter.first, engine.position - 1 - drafter.first))
            done, token = done + len(drafter.run(token, drafter.most, "greedy")), None
        return ran
    call(rewind())
    for _ in range(repeats):
        token = rewind()
        synchronize()
        began = perf_counter_ns()
        ran = call(token)
        synchronize()
        samples.append(perf_counter_ns() - began)
    token, started = rewind(), engine.position
    with Clocks() as clocks:
        call(token)
    if test.startswith("pp"):
        found = [calls_of(engine.steps["logits", size], values={"start": 0, "valid": size})
                 for size in engine.plan(tokens)]
    else:
        tokens, step = engine.position - started, engine.steps["round greedy", drafter.most]
        found = [calls_of(step, values={"base": base, "last": last}) for base, last in ran]
    counts = sum(map(Counts.of, found), Counts())
    times = ClockTimes(clocks.build, clocks.compile, clocks.run)
    return Row(f"{name} {test}", engine.recipe.names(), tokens, samples, times, counts)


def tests_of(recipe: Recipe, grid: bool) -> tuple[str, ...]:
    """What a recipe is measured by: the published grid, or a prompt and some tokens (few where graphs are rebuilt)."""
    return GRID if grid else (f"pp{SHORT if recipe.delta == 'recurrent' else LONG}",
                              "tg1" if recipe.capture == "eager" else "tg16")


def recipes(kind: str) -> dict[str, Recipe]:
    """What is measured: for "ladder" all rungs and the first one captured (so that running can be compared with
    running); for "ablate" the last rung and its ablations; for "copies" the last rung without drafts, copies
    everywhere or none."""
    last = ablations(LADDER[-1].recipe if kind != "copies" else replace(LADDER[-1].recipe, draft=0))
    if kind != "ladder":
        return last if kind == "ablate" else {"none": last["last"], "everywhere": last["-copies"]}
    return {rung.name: rung.recipe for rung in LADDER} | {"naive, captured": replace(NAIVE, capture="jit")}


def in_own_process(subject: Subject, name: str, recipe: Recipe, repeats: int, grid: bool) -> list[Row]:
    """The rows of one recipe, measured in a fresh process."""
    made = json.dumps({"subject": asdict(subject), "name": name, "recipe": recipe.names(), "repeats": repeats,
                       "tests": tests_of(recipe, grid)})
    done = subprocess.run([sys.executable, "-m", "minillama.climb", made], capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"ladder: {name} failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    rows = json.loads(done.stdout.splitlines()[-1])
    return [Row(**row | {"clocks": ClockTimes(**row["clocks"]), "counts": Counts(**row["counts"])}) for row in rows]


def climb(subject: Subject, kind: str, repeats: int, report: Callable[[str], None]) -> Iterator[Result]:
    """Measure all recipes there and back. Yields what one pass has found, in case the other does not come to its end,
    and then both together: their samples, clocks and counts of the second."""
    found: dict[str, Row] = {}
    order, model = list(recipes(kind).items()), subject.model()
    for turn in (order, order[::-1]):
        for name, recipe in turn:
            report(name)
            for row in in_own_process(subject, name, recipe, repeats, kind == "copies"):
                before = found[row.name].samples_ns if row.name in found else []
                found[row.name] = replace(row, samples_ns=before + row.samples_ns)
        yield Result.here(kind, model, list(found.values()))


def table(result: Result) -> str:
    """The result for people, per token: microseconds of building (where that is done every time) and of running."""
    lines = [f"{result.model.name} on {result.device.name} ({result.device.backend}): per token",
             f"{'recipe':<24}{'build µs':>12}{'run µs':>12}{'kernels':>9}{'copies':>8}{'MB':>9}"]
    for row in result.rows:
        per = 1e3 * row.tokens
        eager = row.recipe["capture"] == "eager"    # its samples are mostly building: running is on its own clock
        built = row.clocks.build / per if eager else 0.0
        run = (row.clocks.run if eager else float(np.median(row.samples_ns))) / per
        lines.append(f"{row.name:<24}{built:>12,.0f}{run:>12,.0f}{row.counts.kernels / row.tokens:>9,.1f}"
                     f"{row.counts.copies / row.tokens:>8,.1f}{row.counts.bytes / row.tokens / 1e6:>9,.2f}")
    return "\n".join(lines)


def ladder(args: Namespace) -> None:
    """The command `ladder`."""
    if args.shape is not None and args.kind != "copies":
        raise ValueError("--shape goes with --copies: the other recipes do not keep weights packed, or draft")
    if (args.layers or args.format) and not args.shape:
        raise ValueError("--layers and --format go with --shape; a file has its own")
    subject = (Subject(shape=args.shape, format=args.format or Subject.format, layers=args.layers)
               if args.shape is not None else Subject(args.model or str(SHIPPED)))
    for result in climb(subject, args.kind, args.repeats, lambda name: print(name, file=sys.stderr, flush=True)):
        path = write_result(result, local=not args.store)
    if args.output:
        Path(args.output).write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    print(table(read_result(path)))
    print(f"written to {path}", file=sys.stderr)


def main(made: str) -> None:
    """One recipe, for `in_own_process`: rows as JSON on the last line of stdout."""
    asked = json.loads(made)
    engine = Subject(**asked["subject"]).engine(Recipe(**asked["recipe"]))
    measure = measure_drafts if engine.drafter else measure_test
    rows = [measure(engine, asked["name"], test, asked["repeats"]) for test in asked["tests"]]
    print(json.dumps([asdict(row) for row in rows]))


if __name__ == "__main__":
    main(sys.argv[1])
