"""What a text cost: an engine that tells setting up from running, and the speeds that the command line reports."""
import time
from collections.abc import Iterator

from minillama.engine import Engine
from minillama.measure import Clocks


class ClockedEngine(Engine):
    """An engine that keeps the first call of every step on three clocks: that one builds the step's graph and compiles
    its kernels. Later calls are left alone. All times in nanoseconds."""
    build = compile = aside = 0     # aside: build, compile and what the clocks themselves took

    def call(self, key, run, *given):
        """As `Engine.call`."""
        if key in self.steps:
            return super().call(key, run, *given)
        began = time.perf_counter_ns()
        with Clocks() as clocks:
            out = super().call(key, run, *given)
        self.build, self.compile = self.build + clocks.build, self.compile + clocks.compile
        self.aside += time.perf_counter_ns() - began - clocks.run
        return out


class Report:
    """Tokens and nanoseconds of prompts and of generation, without what setting up took. `began`: when the command was
    started, by `time.perf_counter_ns`."""

    def __init__(self, engine: ClockedEngine, began: int):
        self.engine, self.began, self.loaded, self.first = engine, began, time.perf_counter_ns() - began, 0
        self.prompt, self.generation = [0, 0], [0, 0]       # tokens, nanoseconds

    def watch(self, ids: Iterator[int], fed: int) -> Iterator[int]:
        """Pass on generated ids. The first one comes out of the prompt's last batch, and is on the prompt's time."""
        tokens, speed = fed, self.prompt
        while True:
            began, aside = time.perf_counter_ns(), self.engine.aside
            token = next(ids, None)
            now = time.perf_counter_ns()
            if token is None:
                return
            self.first = self.first or now - self.began
            speed[0] += tokens
            speed[1] += now - began - (self.engine.aside - aside)
            yield token
            tokens, speed = 1, self.generation

    def lines(self) -> list[str]:
        """The report, for people."""
        seconds = [value / 1e9 for value in (self.loaded, self.engine.build, self.engine.compile, self.first)]
        rates = [f"{name:<12}{tokens} tokens in {spent / 1e9:.2f} s, {tokens / spent * 1e9:,.1f} tokens/s"
                 for name, (tokens, spent) in (("prompt", self.prompt), ("generation", self.generation)) if tokens]
        pace = self.engine.drafter.pace if self.engine.drafter else None
        if pace and sum(pace.drafted):
            places = zip(pace.accepted, pace.drafted, strict=True)
            kept = ", ".join(f"{kept} of {seen}" for kept, seen in places if seen)
            rates.append(f"{'drafts':<12}kept at each place: {kept}; {pace.rounds} rounds, of these "
                         f"{pace.without} without drafts")
        return [f"{'loading':<12}{seconds[0]:.2f} s",
                f"{'setting up':<12}building {seconds[1]:.2f} s, compiling {seconds[2]:.2f} s", *rates,
                f"{'first token':<12}{seconds[3]:.2f} s after the start"]
