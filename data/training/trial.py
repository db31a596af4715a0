"""Tokens a second of several variants, before the run."""
import time

import torch

from training.device import CUDA
from training.step import Trainer, build, warm
from training.text import Order


def trial(options, tokens) -> None:
    """Tokens a second of several variants, seconds to compile, peak memory; then a profile of the last one's step."""
    for variant in options.variants.split(","):
        experts, shape, *flags = variant.split(":")
        batch, length = map(int, shape.split("x"))
        try:
            torch.compiler.reset()
            trainer = build(options, tokens, batch, length, experts, "eager" not in flags)
            order = Order(len(tokens), length, batch, options.seed)
            compiled = warm(trainer, order, "nograph" not in flags)
            begun, steps = time.perf_counter(), 0
            while time.perf_counter() - begun < options.trial_seconds:
                for _ in range(5):
                    steps += 1
                    trainer.step(order.next(), min(1.0, steps / 50), steps)
                losses = trainer.averages(5)
            rate = steps * batch * length / (time.perf_counter() - begun)
            memory = torch.cuda.max_memory_allocated() / 2 ** 30 if CUDA else 0
            print(f"{variant}: {rate:,.0f} tokens/s; {steps} steps, ready after {compiled:.0f} s, {memory:.1f} GiB, "
                  f"losses {' '.join(f'{x:.3f}' for x in losses)}", flush=True)
            if CUDA and "profile" in flags:
                profile(trainer, order)
        except Exception as error:
            print(f"{variant}: FAILED {type(error).__name__}: {str(error)[:1500]}", flush=True)
        trainer = None
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def profile(trainer: Trainer, order: Order) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        trainer.step(order.next(), 1.0, 1000)
        torch.cuda.synchronize()
    rows = sorted(profiler.key_averages(), key=lambda row: -row.self_device_time_total)[:28]
    total = sum(row.self_device_time_total for row in profiler.key_averages()) / 1000
    print(f"one step: {total:.1f} ms on the device")
    for row in rows:
        print(f"  {row.self_device_time_total / 1000:7.2f} ms {row.count:5d} x {row.key[:90]}", flush=True)
