"""Which part of the model each kernel of a captured step belongs to, and what that part would need at least.

A kernel belongs to the last part, in the flow of data, whose weights or state it touches or whose work it goes on
with.
"""
from collections.abc import Iterator
from dataclasses import dataclass

from tinygrad import Tensor, TinyJit, UOp

from minillama.config import ModelConfig
from minillama.measure import Call, Counts, calls_of
from minillama.roofline import Roofline
from minillama.shapes import tensors_of
from minillama.state import DeltaRings, DeltaState, KVCache
from minillama.weights import AttentionWeights, LayerWeights, MTPWeights, Weight

ORDER = ("embedding", "norm", "MTP input", "projections", "convolution", "delta rule", "attention",
         "output projection", "router", "shared expert", "experts", "head")


@dataclass(frozen=True)
class Mark:
    """A buffer by which the kernels of a part are known. `then`: the part that goes on with what they leave behind.
    `bytes` and `ops`: what a step must move of the buffer and do with it, if nothing is wasted."""
    part: str
    then: str
    bytes: float = 0.0
    ops: float = 0.0


@dataclass(frozen=True)
class Part:
    """A part of the model: what it runs, in one layer, and what would do."""
    name: str
    calls: tuple[Call, ...]
    ideal_bytes: int
    ideal_ops: int

    @property
    def counts(self) -> Counts:
        return Counts.of(list(self.calls))

    def seconds(self, roof: Roofline) -> float:
        """The least time that a machine could take for these kernels, one after the other."""
        return sum(roof.seconds(call.bytes, call.ops, call.kind == "kernel") for call in self.calls)


class Marks(dict[UOp, Mark]):
    """Marked buffers of what a step of `tokens` tokens at position `depth` touches."""

    def __init__(self, config: ModelConfig, tokens: int, depth: int, logits: int = 1):
        self.config, self.tokens, self.depth, self.logits = config, tokens, depth, logits

    def weight(self, part: str, then: str, *tensors: Weight, picked: float = 1.0, share: float = 1.0) -> None:
        """Weights that are read once, but only the part `picked`; each token is multiplied by a `share` of them."""
        for weight in tensors:
            ops = 2 * weight.numel() * share * self.tokens if len(weight.shape) > 1 else 0
            for tensor in tensors_of(weight):
                self[tensor.uop.base] = Mark(part, then, tensor.nbytes() * picked, ops)
                ops = 0

    def layer(self, w: LayerWeights, state: DeltaState | DeltaRings | KVCache) -> "Marks":
        used = self.config.experts_used / self.config.experts
        picked = min(1.0, self.tokens * used)
        self.weight("norm", "norm", w.norm, w.post_norm)
        if isinstance(w.mixer, AttentionWeights):
            self.weight("projections", "attention", *w.mixer.inputs)
            self.weight("attention", "attention", w.mixer.q_norm, w.mixer.k_norm)
            for cache in state.tensors():       # the rows before are read, the new ones written
                rows = (self.depth + self.tokens) / cache.shape[0]
                self[cache.uop.base] = Mark("attention", "attention", cache.nbytes() * rows)
        else:
            self.weight("projections", "convolution", *w.mixer.inputs)
            self.weight("convolution", "delta rule", w.mixer.conv)
            self.weight("delta rule", "delta rule", w.mixer.dt_bias, w.mixer.a, w.mixer.norm)
            for tensor, part in zip(state.tensors(), ("convolution", "delta rule"), strict=True):
                bytes = 2 * tensor.nbytes() if isinstance(state, DeltaState) else self.of_ring(part, tensor)
                self[tensor.uop.base] = Mark(part, part, bytes)
        self.weight("output projection", "norm", w.mixer.out)
        self.weight("router", "router", w.experts.router)
        self.weight("shared expert", "shared expert", w.experts.shared_gate, *w.experts.shared_inputs,
                    w.experts.shared_down)
        self.weight("experts", "experts", *w.experts.gate_up, picked=picked, share=used)
        self.weight("experts", "norm", w.experts.down, picked=picked, share=used)
        return self

    def of_ring(self, part: str, ring: Tensor) -> int:
        """Bytes that a step must move of a ring: it reads the last rows, and writes a row for each of its tokens."""
        read, written = (self.config.conv_width - 1, min(self.tokens, self.config.conv_width - 1)
                         ) if part == "convolution" else (1, 1)
        return (read + written) * ring.nbytes() // ring.shape[0]

    def mtp(self, w: MTPWeights, state: KVCache) -> "Marks":
        self.layer(w.layer, state)
        self.weight("norm", "norm", w.embed_norm, w.hidden_norm, w.out_norm)
        self.weight("MTP input", "norm", w.project)
        return self.ends(w.embed, w.head)

    def mtp_keys(self, w: MTPWeights, kv: tuple[Weight, ...], state: KVCache) -> "Marks":
        """Of the block only what makes keys and values, as `mtp.remember_tokens` runs it."""
        self.weight("norm", "norm", w.embed_norm, w.hidden_norm, w.layer.norm)
        self.weight("MTP input", "norm", w.project)
        self.weight("projections", "attention", *kv)
        self.weight("attention", "attention", w.layer.mixer.k_norm)
        for cache in state.tensors():           # only written
            self[cache.uop.base] = Mark("attention", "attention", cache.nbytes() * self.tokens / cache.shape[0])
        for tensor in tensors_of(w.embed):
            self[tensor.uop.base] = Mark("embedding", "norm", self.tokens * tensor.nbytes() / w.embed.shape[0])
        return self

    def ends(self, embed: Weight, head: Weight) -> "Marks":
        rows = self.logits
        for tensor in tensors_of(embed):
            self[tensor.uop.base] = Mark("embedding", "norm", self.tokens * tensor.nbytes() / embed.shape[0])
        written, ops = rows * head.shape[0] * 4, 2 * rows * head.numel()
        for tensor in tensors_of(head):
            self[tensor.uop.base] = Mark("head", "head", tensor.nbytes() + written, ops)
            written = ops = 0
        return self

    def named(self, replay: TinyJit) -> list[tuple[Call, str]]:
        """The captured step's kernels in order, each with the part of the model that it belongs to."""
        calls = calls_of(replay, values={"start": self.depth, "valid": self.tokens})
        found: list[tuple[Call, str]] = []
        behind: dict[UOp, Mark] = {}            # buffer -> the part of whoever goes on with its present contents
        for call, uop in zip(calls, replay.captured.linear.src, strict=True):
            touched = [self[buffer.base] for buffer in uop.src[1:] if buffer.base in self]
            left = [behind[buffer] for buffer in uop.src[2:] if buffer in behind]
            mark = max([*touched, *left], key=lambda mark: ORDER.index(mark.part), default=Mark("norm", "norm"))
            found.append((call, mark.part))
            # a kernel's first buffer is its output; an unpacked weight stands for the weight
            behind[uop.src[1]] = mark if call.name.startswith("unpack_") else Mark(mark.then, mark.then)
        return found

    def parts(self, replay: TinyJit) -> Iterator[Part]:
        """The captured step's kernels, sorted; parts that have neither kernels nor marks are left out."""
        named = self.named(replay)
        for name in ORDER:
            own = tuple(call for call, part in named if part == name)
            marks = [mark for mark in self.values() if mark.part == name]
            if own or marks:
                yield Part(name, own, round(sum(m.bytes for m in marks)), round(sum(m.ops for m in marks)))
