"""Muon for matrices, Adam for the rest."""
import math

import torch

from training.device import DEVICE, HALF


def orthogonalize(g):
    """Matrices of the same directions with singular values near 1, by five Newton-Schulz steps; g (n, rows <=
    columns). Source: Jordan 2024, "Muon"."""
    x = g.to(HALF)
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).to(HALF)
    for a, b, c in [(3.4445, -4.7750, 2.0315)] * 5:
        square = x @ x.transpose(-1, -2)
        x = a * x + (b * square + c * square @ square) @ x
    return x.float()


class Optimizer:
    """Muon for the matrices of the blocks (an expert is one matrix), Adam for embedding, head, router, vectors.

    Everything happens on the device; `settings` holds what changes from step to step, so that a captured graph can be
    replayed: [learning rate relative to the peak, Adam's bias corrections 1 - b1^t and 1 - b2^t].
    """

    def __init__(self, weights: dict, muon_lr: float, adam_lr: float, embed_lr: float, decay: float):
        self.weights, self.muon_lr, self.decay = weights, muon_lr, decay
        self.settings = torch.ones(3, device=DEVICE)
        self.groups, self.adam = {}, {}
        small = ("ffn_gate_inp.weight", "ssm_ba.weight", "ssm_conv1d.weight", "output.weight", "token_embd.weight")
        for name, p in weights.items():
            if p.ndim == 1 or name.endswith(small):
                rate = embed_lr if name == "token_embd.weight" else adam_lr
                self.adam.setdefault(rate, []).append(name)
            else:
                self.groups.setdefault(tuple(sorted(p.shape[-2:])), []).append(name)
        self.momentum = {shape: torch.zeros_like(self.stacked(weights, names)) for shape, names in self.groups.items()}
        self.first = {name: torch.zeros_like(weights[name]) for names in self.adam.values() for name in names}
        self.second = {name: torch.zeros_like(value) for name, value in self.first.items()}

    @staticmethod
    def upright(t):
        t = t if t.ndim == 3 else t.unsqueeze(0)
        return t if t.shape[1] <= t.shape[2] else t.transpose(1, 2)

    def stacked(self, tensors: dict, names: list):
        """(n, rows <= columns): all matrices of one shape."""
        return torch.cat([self.upright(tensors[name].detach()) for name in names])

    def step(self, grads: dict) -> None:
        for shape, names in self.groups.items():
            g, momentum = self.stacked(grads, names), self.momentum[shape]
            momentum.lerp_(g, 0.05)
            rate = 0.2 * math.sqrt(shape[1]) * self.muon_lr * self.settings[0]     # rms as Adam's steps have it
            update = orthogonalize(g.lerp(momentum, 0.95)) * rate
            views = [self.upright(self.weights[name]) for name in names]
            torch._foreach_mul_(views, 1 - self.decay * self.muon_lr * self.settings[0])
            torch._foreach_sub_(views, list(update.split([view.shape[0] for view in views])))
        for rate, names in self.adam.items():
            g, p, m, v = ([t[name] for name in names] for t in (grads, self.weights, self.first, self.second))
            torch._foreach_lerp_(m, g, 0.1)
            torch._foreach_mul_(v, 0.95)
            torch._foreach_addcmul_(v, g, g, 0.05)
            size = torch._foreach_div(v, self.settings[2])
            torch._foreach_sqrt_(size)
            torch._foreach_add_(size, 1e-8)
            update = torch._foreach_div(m, size)
            torch._foreach_mul_(update, rate * self.settings[0] / self.settings[1])
            torch._foreach_sub_(p, update)

    def set(self, scale: float, step: int) -> None:
        values = torch.tensor([scale, 1 - 0.9 ** step, 1 - 0.95 ** step])
        self.settings.copy_(values, non_blocking=True)

    def state(self) -> list:
        return [*self.weights.values(), *self.momentum.values(), *self.first.values(), *self.second.values()]
