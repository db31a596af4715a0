"""The run: training by the clock, with a log, checkpoints and evaluations on the way."""
import json
import math
import time
from pathlib import Path

import torch

from training.device import CUDA
from training.evaluation import evaluate
from training.parts import save_parts
from training.step import build, warm
from training.text import Order
from training.weights import in_file_form


def schedule(done: float) -> float:
    """Learning rate relative to the peak when a share `done` of the time is over: warm up, hold, go down to zero."""
    return min(1.0, done / 0.01 + 0.02, max(0.0, (1 - done) / 0.6))


class Run:
    """One training run: what it logs and saves, and the last good state to fall back to."""

    def __init__(self, options, tokens, heldout, heldout_bytes: int, end: int):
        self.options, self.text = options, (heldout, heldout_bytes, end)
        self.folder = Path(options.out)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.folder / "log.jsonl", "a")
        print(json.dumps(vars(options)), f"{len(tokens):,} tokens", flush=True)
        self.trainer = build(options, tokens, options.batch, options.sequence, options.experts, not options.eager)
        self.order = Order(len(tokens), options.sequence, options.batch, options.seed)
        self.step, self.caution = 0, 1.0
        print(f"compiled in {warm(self.trainer, self.order, not options.no_graph):.0f} s", flush=True)
        self.good = [tensor.clone() for tensor in self.trainer.optimizer.state()]

    @property
    def tokens(self) -> int:
        return self.step * self.options.batch * self.options.sequence

    def log(self, **values) -> None:
        line = json.dumps({key: round(v, 5) if isinstance(v, float) else v for key, v in values.items()})
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def save(self, name: str, **more) -> None:
        about = {"step": self.step, "tokens": self.tokens, "epochs": self.order.epoch, "options": vars(self.options),
                 **more}
        save_parts(self.folder / name, in_file_form(self.trainer.model.weights), about)

    def evaluate(self, sequences: int | None) -> dict:
        return evaluate(self.trainer.model, *self.text, sequences)

    def report(self, begun: float, since: float, steps: int, scale: float) -> float:
        """Log the averages of the last `steps` steps; returns the time."""
        losses = self.trainer.averages(steps)
        now = time.perf_counter()
        rate = steps * self.options.batch * self.options.sequence / (now - since)
        self.log(step=self.step, seconds=now - begun, tokens=self.tokens, tokens_per_second=round(rate),
                 epoch=self.order.epoch, loss=losses[0], first=losses[1], second=losses[2], balance=losses[3],
                 gradient=losses[4], bad_steps=losses[5], lr=scale)
        state = zip(self.trainer.optimizer.state(), self.good, strict=True)
        if all(map(math.isfinite, losses[:4])):
            for tensor, kept in state:
                kept.copy_(tensor.detach())
        else:                               # start again from the last good state, more carefully
            self.caution *= 0.5
            for tensor, kept in state:
                tensor.data.copy_(kept)
        return now

    def go(self) -> None:
        """Train until the time or the steps are over."""
        o, begun = self.options, time.perf_counter()
        budget = 60 * o.minutes - (begun - o.started) - o.reserve
        logged, saved, evaluated, at = begun, begun, begun, 0
        while True:
            now = time.perf_counter()
            done = max((now - begun) / budget, self.step / o.steps if o.steps else 0.0)
            if done >= 1:
                break
            self.step += 1
            scale = self.caution * schedule(done)
            self.trainer.step(self.order.next(), scale, self.step)
            if now - logged >= o.log_seconds or self.step == 1 or (o.steps and self.step % 10 == 0):
                logged, at = self.report(begun, logged, self.step - at, scale), self.step
            if now - saved >= o.save_minutes * 60:
                self.save("checkpoint")
                saved = time.perf_counter()
            if now - evaluated >= o.eval_minutes * 60:
                self.log(step=self.step, heldout=self.evaluate(o.batch * 2))
                evaluated = time.perf_counter()
        self.finish(begun)

    def finish(self, begun: float) -> None:
        self.save("final")
        result = self.evaluate(None if CUDA else 2 * self.options.batch)
        self.log(step=self.step, tokens=self.tokens, epochs=self.order.epoch, seconds=time.perf_counter() - begun,
                 heldout=result)
        self.save("final", heldout=result, device=torch.cuda.get_device_name() if CUDA else "CPU")
        print("done", flush=True)
