"""Speed of prompts and of generation, by llama-bench's procedure and under its names.

`pp512` runs a prompt of 512 random tokens in batches of `-ub` and evaluates the head for each batch's last token (what
llama-bench does with `-b` equal to `-ub`); `tg128` feeds 128 random tokens one by one and waits for the device after
each; `pp512+tg128` does one after the other; `@ d4096` starts at that position, behind a prompt that is not timed. One
run warms up (there graphs are captured and kernels compiled), then each test is repeated from a cleared state.

With drafts, tokens are generated in rounds, and prompts run what the MTP block needs (`mtp_prefill`). Random weights
guess nothing right: `accept` decides by chance which drafts are kept, for the speed alone. The drafts, the model's
look at them and all that is read for both are real; the result is marked as simulated.
"""
import csv
import io
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from tinygrad import Tensor

from minillama.clocked import ClockedEngine
from minillama.config import ModelConfig
from minillama.engine import BATCHES, Engine
from minillama.measure import synchronize
from minillama.recipe import Recipe
from minillama.results import ClockTimes, Model, Result, Row, cpu_name, this_commit, this_device
from minillama.weights import ModelWeights

SEED = 0


@dataclass(frozen=True)
class Trial:
    """Tokens of the prompt and of the generation that are timed, and of the text before them."""
    prompt: int
    generated: int
    depth: int = 0

    @property
    def name(self) -> str:
        """pp512, tg128, pp512+tg128, with @ d4096 where it does not start at 0."""
        parts = [f"{kind}{count}" for kind, count in (("pp", self.prompt), ("tg", self.generated)) if count]
        return "+".join(parts) + (f" @ d{self.depth}" if self.depth else "")

    @property
    def tokens(self) -> int:
        return self.prompt + self.generated


@dataclass(frozen=True)
class Subject:
    """What is measured: `file` as the user named it, `model` for the result file, its size in bytes on the device, the
    number of its parameters; the batch sizes it runs with."""
    file: str
    model: Model
    bytes: int
    parameters: int
    batches: tuple[int, ...] = BATCHES[:1]

    @property
    def kind(self) -> str:
        """What stands in the table."""
        return f"{self.model.name} {self.model.format}"


@dataclass(frozen=True)
class Measured:
    """One test's samples, each for all of its tokens; `clocks` are those of the warm-up run, in nanoseconds. `accept`:
    the simulated probability that a draft is kept; `kept`: how many were in a round, on average, of either kind."""
    test: Trial
    batch: int
    recipe: Recipe
    samples_ns: list[int]
    clocks: ClockTimes
    accept: float | None = None
    kept: float = 0.0
    began: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    @property
    def speeds(self) -> list[float]:
        """Tokens a second, of each sample."""
        return [1e9 * self.test.tokens / sample for sample in self.samples_ns]


def trials(prompts: Iterable[int], generations: Iterable[int], pairs: Iterable[tuple[int, int]],
             depths: Iterable[int]) -> list[Trial]:
    """All combinations, in llama-bench's order; a count of 0 leaves a test out."""
    pairs = list(pairs)
    kinds = [(p, 0) for p in prompts] + [(0, n) for n in generations] + pairs
    return [Trial(p, n, depth) for depth in depths for p, n in kinds if p or n]


def check_room(tests: list[Trial], config: ModelConfig, drafts: int = 0) -> int:
    """The context that all tests fit into, in tokens; drafts may pass the mark. Raises ValueError where the model has
    no such context."""
    context = max(test.tokens + test.depth for test in tests) + drafts
    if context > config.context:
        raise ValueError(f"{context} tokens do not fit into the model's context of {config.context}")
    return context


def batches_for(largest: int) -> tuple[int, ...]:
    """The engine's batch sizes, up to `largest`. Raises ValueError for one that no chunk of the delta rule divides."""
    if largest < 1 or (largest & (largest - 1) if largest < 64 else largest % 64):
        raise ValueError(f"-ub {largest}: a batch is 1, 2, 4, 8, 16, 32 or a multiple of 64 tokens")
    return tuple(sorted({largest, *(size for size in BATCHES if size < largest)}, reverse=True))


# ---- running ------------------------------------------------------------------------------------------------------


class Bench:
    """Runs tests on one engine, and keeps the state at the last depth it had to compute."""

    def __init__(self, engine: Engine, accept: float | None = None, length: int | None = None):
        self.engine, self.random, self.accept = engine, np.random.default_rng(SEED), accept
        self.length = engine.recipe.draft if length is None else length     # drafts of a round
        self.depth, self.kept = 0, []
        self.rounds = self.accepted = 0

    def ids(self, count: int) -> list[int]:
        return self.random.integers(0, self.engine.config.vocab, count).tolist()

    def prompt(self, count: int) -> None:
        if count:
            self.engine.feed(self.ids(count))
            synchronize()

    def generate(self, count: int) -> float:
        """Generate tokens; returns which share of the time they took, since a round may pass the mark."""
        if count and self.engine.drafter:
            return count / self.draft(count)
        for _ in range(count):
            self.engine.feed(self.ids(1))
            synchronize()
        return 1.0

    def draft(self, count: int) -> int:
        """At least `count` tokens, the first by a plain step, then in rounds; returns how many."""
        drafter, length = self.engine.drafter, self.length
        token, done = int(self.engine.feed(self.ids(1), "greedy").item()), 1
        while done < count:
            kind, more = "greedy", []
            if self.accept is not None:
                matches = (self.random.random(length) < self.accept).astype(np.int32)
                kind, more = "simulated", [self.engine.input("matches", matches)]
            found = len(drafter.run(token, length, kind, *more))
            self.rounds, self.accepted = self.rounds + 1, self.accepted + found - 1
            token, done = None, done + found
        return done

    def go_to(self, depth: int) -> None:
        """Clear the state, or put it behind a text of `depth` tokens."""
        self.engine.clear()
        tensors = self.engine.state.tensors()
        if depth and depth == self.depth:
            Tensor.realize(*(tensor.assign(kept) for tensor, kept in zip(tensors, self.kept, strict=True)))
            self.engine.position = depth
            if self.engine.drafter:
                self.engine.drafter.after_prompt()
        elif depth:
            self.prompt(depth)
            self.depth, self.kept = depth, [tensor.clone().realize() for tensor in tensors]
        synchronize()

    def warm_up(self, test: Trial) -> int:
        """Capture what the test runs; returns the nanoseconds that took."""
        began = time.perf_counter_ns()
        self.go_to(test.depth)
        self.prompt(test.prompt)
        self.generate(min(test.generated, 2))       # one captures, one replays
        self.rounds = self.accepted = 0
        return time.perf_counter_ns() - began

    def sample(self, test: Trial) -> int:
        """Nanoseconds of one run."""
        self.go_to(test.depth)
        began = time.perf_counter_ns()
        self.prompt(test.prompt)
        share, middle = 1.0, time.perf_counter_ns()
        if test.generated:
            share = self.generate(test.generated)
        return middle - began + round((time.perf_counter_ns() - middle) * share)

    def run(self, test: Trial, repetitions: int) -> tuple[list[int], int]:
        """Warm up, then take the samples. Returns them, and what the warm-up took; all in nanoseconds."""
        warm = self.warm_up(test)
        return [self.sample(test) for _ in range(repetitions)], warm


def measure(weights: ModelWeights, config: ModelConfig, recipe: Recipe, tests: list[Trial],
            batches: tuple[int, ...], repetitions: int, accept: float | None = None) -> Iterator[Measured]:
    """Run every test with every batch size. Raises ValueError, before anything runs, for a text that does not fit."""
    context = check_room(tests, config, recipe.draft)
    sizes = [batches_for(batch) for batch in batches]
    for batch, these in zip(batches, sizes, strict=True):
        engine = ClockedEngine(weights, config, recipe, context=context, batches=these)
        bench = Bench(engine, accept)
        for test in tests:
            build, compile = engine.build, engine.compile
            samples, warm = bench.run(test, repetitions)
            build, compile = engine.build - build, engine.compile - compile
            yield Measured(test, batch, recipe, samples, ClockTimes(build, compile, max(0, warm - build - compile)),
                           accept if test.generated else None, bench.accepted / max(1, bench.rounds))


# ---- reporting ----------------------------------------------------------------------------------------------------


def deviation(samples: list) -> float:
    """The sample standard deviation; 0 of a single one."""
    return statistics.stdev(samples) if len(samples) > 1 else 0.0


def fields_of(subject: Subject, m: Measured) -> dict:
    """A test as llama-bench's JSON names it, fields that mean nothing here left out; `recipe` is ours."""
    device = this_device()
    return {
        "build_commit": this_commit(), "cpu_info": cpu_name(),
        "gpu_info": "" if device.backend == "CPU" else device.name, "backends": device.backend,
        "model_filename": subject.file, "model_type": subject.kind, "model_size": subject.bytes,
        "model_n_params": subject.parameters, "n_batch": m.batch, "n_ubatch": m.batch, "type_k": "f32",
        "type_v": "f32", "n_prompt": m.test.prompt, "n_gen": m.test.generated, "n_depth": m.test.depth,
        "test_time": m.began, "avg_ns": round(statistics.mean(m.samples_ns)),
        "stddev_ns": round(deviation(m.samples_ns)), "avg_ts": statistics.mean(m.speeds),
        "stddev_ts": deviation(m.speeds), "simulated": m.accept is not None, "accept": m.accept,
        "recipe": ",".join(f"{k}={v}" for k, v in m.recipe.names().items()),
        "samples_ns": m.samples_ns, "samples_ts": m.speeds}


def as_json(subject: Subject, measured: Iterable[Measured]) -> Iterator[str]:
    """A list of records; each appears when it is measured."""
    lead = "[\n"
    for m in measured:
        yield lead + json.dumps(fields_of(subject, m), ensure_ascii=False, indent=2)
        lead = ",\n"
    yield "\n]\n"


def as_jsonl(subject: Subject, measured: Iterable[Measured]) -> Iterator[str]:
    """One record a line."""
    for m in measured:
        yield json.dumps(fields_of(subject, m), ensure_ascii=False) + "\n"


def as_csv(subject: Subject, measured: Iterable[Measured]) -> Iterator[str]:
    """The records without their samples; all values quoted, as llama-bench does."""
    for index, m in enumerate(measured):
        fields = {name: value for name, value in fields_of(subject, m).items() if not name.startswith("samples")}
        text = io.StringIO()
        csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n").writerow(fields.values())
        yield ("" if index else ",".join(fields) + "\n") + text.getvalue()


def size_text(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def count_text(count: int) -> str:
    return f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.2f} M"


def changes(recipe: Recipe, accept: float | None = None) -> str:
    """The fields of a recipe that are not the default's, and what was simulated."""
    standard = Recipe().names()
    fields = [f"{name}={value}" for name, value in recipe.names().items() if value != standard[name]]
    return ",".join(fields + ([] if accept is None else [f"accept={accept:g} (simulated)"]))


def as_markdown(subject: Subject, measured: Iterable[Measured]) -> Iterator[str]:
    """llama-bench's table, with columns for a batch size and for a recipe that are not the default."""
    widths = {"model": -max(30, len(subject.kind)), "size": 10, "params": 10, "backend": 7, "n_ubatch": 8,
              "recipe": -30, "test": 15, "t/s": 20}       # a negative width: to the left
    for index, m in enumerate(measured):
        if not index:
            standard = {"n_ubatch": subject.batches == BATCHES[:1], "recipe": not changes(m.recipe)}
            widths = {name: width for name, width in widths.items() if not standard.get(name)}
            rules = ("-" * (abs(width) - 1) + ("-" if width < 0 else ":") for width in widths.values())
            yield row_of(widths, {name: name for name in widths})
            yield row_of(widths, dict(zip(widths, rules, strict=True)))
        yield row_of(widths, {
            "model": subject.kind, "size": size_text(subject.bytes), "params": count_text(subject.parameters),
            "backend": this_device().backend, "n_ubatch": str(m.batch), "recipe": changes(m.recipe, m.accept),
            "test": m.test.name, "t/s": f"{statistics.mean(m.speeds):.2f} ± {deviation(m.speeds):.2f}"})
    yield f"\nbuild: {this_commit()}\n"


def row_of(widths: dict[str, int], cells: dict[str, str]) -> str:
    """One line of a markdown table."""
    return "| " + " | ".join(f"{cells[name]:{'<' if width < 0 else '>'}{abs(width)}}"
                             for name, width in widths.items()) + " |\n"


OUTPUTS: dict[str, Callable[[Subject, Iterable[Measured]], Iterator[str]]] = {
    "md": as_markdown, "csv": as_csv, "json": as_json, "jsonl": as_jsonl}


def as_result(subject: Subject, measured: list[Measured]) -> Result:
    """The tests as a result file of the kind bench; a row's clocks are those of its warm-up run."""
    rows = [Row(m.test.name, m.recipe.names(), m.test.tokens, m.samples_ns, m.clocks, values={
        "n_prompt": m.test.prompt, "n_gen": m.test.generated, "n_depth": m.test.depth, "n_ubatch": m.batch,
        "model_size": subject.bytes, "model_n_params": subject.parameters} | (
            {"drafts_kept_a_round": m.kept} if m.kept else {}) | ({} if m.accept is None else {"accept": m.accept}),
        simulated=m.accept is not None) for m in measured]
    return Result.here("bench", subject.model, rows)
