"""One training step: losses, gradients, clipping, the update; captured as a CUDA graph where possible."""
import time

import torch

from training.delta import CHUNK
from training.device import CUDA, DEVICE
from training.kernels import inverse_of_unit_lower
from training.model import Model
from training.optimizer import Optimizer
from training.text import Order
from training.weights import initial_weights


class Trainer:
    """One training step, captured as a CUDA graph where possible."""

    def __init__(self, model: Model, optimizer: Optimizer, tokens, options):
        self.model, self.optimizer, self.text, self.options = model, optimizer, tokens, options
        self.starts = torch.zeros(model.batch, dtype=torch.int64, device=DEVICE)
        self.reach = torch.arange(model.tokens + 2, device=DEVICE)
        self.weigh = torch.ones(2, device=DEVICE)                           # of the two draft losses
        self.report = torch.zeros(6, device=DEVICE)                         # sums: losses, gradient norm, bad steps
        self.graph, self.running = None, []

    def compute(self) -> None:
        o, w = self.options, self.model.weights
        if o.dropout:
            self.model.set_dropout(o.dropout)
        ids = self.text[self.starts[:, None] + self.reach]
        loss, first, second, balance, *_ = self.model.losses(ids)
        total = loss + self.weigh[0] * first + self.weigh[1] * second + o.balance * balance
        grads = torch.autograd.grad(total, list(w.values()))
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        good = torch.isfinite(norm)
        scale = torch.where(good, (o.clip / (norm + 1e-6)).clamp(max=1.0), 0.0)
        grads = [torch.where(good, g * scale, 0.0) for g in grads]
        with torch.no_grad():
            self.optimizer.step(dict(zip(w, grads, strict=True)))
        self.report += torch.stack([loss, first, second, balance, norm, (~good).float()]).detach()

    def step(self, starts, scale: float, number: int) -> None:
        self.starts.copy_(starts, non_blocking=True)
        self.optimizer.set(scale, number)
        self.graph.replay() if self.graph else self.compute()
        if CUDA:        # stay two steps ahead of the device and no more: the clock rules the schedule
            self.running.append(torch.cuda.Event())
            self.running[-1].record()
            if len(self.running) > 2:
                self.running.pop(0).synchronize()

    def averages(self, steps: int) -> list[float]:
        """Means of `report` over the steps since the last call; waits for the device."""
        values = (self.report / steps).tolist()
        self.report.zero_()
        return values

    def capture(self) -> None:
        """Record the step once, after it has run often enough to be compiled."""
        self.optimizer.settings[0] = 0.0
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.compute()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.compute()
        self.graph = graph


def build(options, tokens, batch: int, length: int, experts: str, compile: bool) -> Trainer:
    weights = initial_weights(options.seed)
    model = Model(weights, batch, length, experts, compile, options.soft)
    optimizer = Optimizer(weights, options.muon_lr, options.adam_lr, options.embed_lr, options.decay)
    trainer = Trainer(model, optimizer, tokens, options)
    trainer.weigh.copy_(torch.tensor([options.first, options.second]))
    return trainer


def check_kernels() -> None:
    """The Triton inverse against float64."""
    lower = (torch.randn(32, CHUNK, CHUNK, device=DEVICE) * 0.3).tril(-1)
    want = torch.linalg.inv(torch.eye(CHUNK, device=DEVICE, dtype=torch.float64) + lower.double())
    error = ((inverse_of_unit_lower(lower) - want).abs().max() / want.abs().max()).item()
    print(f"inverse: relative error {error:.1e}", flush=True)
    assert error < 1e-4, error


def warm(trainer: Trainer, order: Order, graph: bool) -> float:
    """Compile (two steps without effect) and capture; seconds."""
    begun = time.perf_counter()
    for _ in range(2):
        trainer.step(order.next(), 0.0, 1)
    for tensor in trainer.optimizer.state()[len(trainer.model.weights):]:
        tensor.zero_()
    if graph and CUDA:
        try:
            trainer.capture()
        except Exception as error:      # slower, but it trains
            print(f"no CUDA graph: {type(error).__name__}: {str(error)[:500]}", flush=True)
        for tensor in trainer.optimizer.state()[len(trainer.model.weights):]:
            tensor.zero_()
    trainer.averages(1)
    return time.perf_counter() - begun
