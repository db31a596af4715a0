"""Real models by name, and random weights of their shapes: speed and counts can be had without any file.

The numbers are those of the models' published configurations. Weights are made on the device, one kernel a tensor, by
hashing each value's index: an 80B layer (1.6 billion values) is ready in a moment, and always the same.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass

from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from minillama.config import ModelConfig, expected_tensors
from minillama.weights import AttentionWeights, DeltaNetWeights, ExpertWeights, LayerWeights, ModelWeights, MTPWeights

INTERVAL = 4        # every fourth layer has attention
QWEN3_NEXT = dict(layers=48, context=262144, hidden=2048, vocab=151936, norm_eps=1e-6, heads=16, kv_heads=2,
                  head_dim=256, rope_dim=64, rope_base=1e7, k_heads=16, v_heads=32, state_dim=128, conv_width=4,
                  experts=512, experts_used=10, expert_width=512, shared_width=512)
SHAPES: dict[str, dict] = {
    "qwen3-next-80b-a3b": QWEN3_NEXT,
    "qwen3-coder-next": QWEN3_NEXT | dict(rope_base=5e6),
    "tiny": dict(layers=4, context=4096, hidden=64, vocab=256, norm_eps=1e-6, heads=2, kv_heads=1, head_dim=32,
                 rope_dim=8, rope_base=1e4, k_heads=2, v_heads=4, state_dim=16, conv_width=4, experts=8,
                 experts_used=2, expert_width=32, shared_width=32),       # for trying things out
}
FORMATS: dict[str, DType] = {"F32": dtypes.float32, "F16": dtypes.float16}


def shape_config(name: str, layers: int | None = None, mtp: bool = False) -> ModelConfig:
    """The configuration of a real model, with fewer (or more) layers in the same pattern, with or without its MTP
    block. Raises ValueError, in one line, for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r:.60}: the shapes are {', '.join(SHAPES)}")
    numbers = SHAPES[name] | ({} if layers is None else {"layers": layers})
    recurrent = tuple((i + 1) % INTERVAL != 0 for i in range(numbers["layers"]))
    return ModelConfig(name=name, mtp_blocks=int(mtp), recurrent=recurrent, **numbers)


def weight_format(name: str) -> DType:
    """The type behind a format's name. Raises ValueError for one in which no random weights can be made."""
    if name not in FORMATS:
        raise ValueError(f"--format {name:.30}: random weights come in {' or '.join(FORMATS)}, not (yet) packed")
    return FORMATS[name]


def parameters(config: ModelConfig, names: Iterable[str] = ("output.weight",)) -> int:
    """How many values a model's weights have; `names` as for `expected_tensors`: here a head of its own."""
    return sum(math.prod(shape) for shape in expected_tensors(config, set(names)).values())


# ---- values -----------------------------------------------------------------------------------------------------

Fill = Callable[[tuple[int, ...], float, float, DType], Tensor]


def hashed(device: str | None = None) -> Fill:
    """A maker of tensors of uniform values between two bounds, each tensor another; one kernel, nothing else stored.

    The bits are those of the integer hash "lowbias32" (C. Wellons, hash-prospector). The number of the tensor goes in
    as data, so that tensors of one shape share a kernel.
    """
    made = 0

    def fill(shape: tuple[int, ...], low: float, high: float, dtype: DType) -> Tensor:
        nonlocal made
        made += 1
        number = Tensor([made], dtype=dtypes.uint32, device=device).realize()
        x = Tensor.arange(math.prod(shape), dtype=dtypes.int32).cast(dtypes.uint32)
        x = x * 0x9e3779b1 + number * 0x85ebca6b
        x = (x ^ (x >> 16)) * 0x7feb352d
        x = (x ^ (x >> 15)) * 0x846ca68b
        unit = ((x ^ (x >> 16)) >> 8).float() * 2 ** -24                    # 0 .. 1
        return (unit * (high - low) + low).cast(dtype).reshape(shape).contiguous().realize()
    return fill


def unfilled(device: str | None = None) -> Fill:
    """A maker of tensors that have no values, for counting: on the NULL device they take no memory."""
    return lambda shape, low, high, dtype: Tensor.empty(*shape, dtype=dtype, device=device)


class RandomWeights:
    """Makes the engine's records. Matrices are in `dtype`; what is small, the router and the embedding (of which a
    step reads one row a token) are float32. Rows are scaled by 1 / sqrt(columns), so that every product keeps its
    input's size, and what is added to the residual stream by half of that."""

    def __init__(self, config: ModelConfig, dtype: DType, fused: bool, fill: Fill):
        self.config, self.dtype, self.fused, self.fill = config, dtype, fused, fill

    def matrix(self, *shape: int, gain: float = 1.0, dtype: DType | None = None) -> Tensor:
        bound = gain * math.sqrt(3 / shape[-1])                             # uniform to +-b: variance b^2 / 3
        return self.fill(shape, -bound, bound, dtype or self.dtype)

    def small(self, size: int, low: float = 1.0, high: float = 1.0) -> Tensor:
        return self.fill((size,), low, high, dtypes.float32)

    def inputs(self, *rows: int, experts: tuple[int, ...] = ()) -> tuple[Tensor, ...]:
        """Weights that read the hidden state, stacked as one where projections are fused."""
        stacked = (sum(rows),) if self.fused else rows
        return tuple(self.matrix(*experts, count, self.config.hidden) for count in stacked)

    def delta_net(self) -> DeltaNetWeights:
        c = self.config
        return DeltaNetWeights(
            self.inputs(c.conv_channels, c.value_width, c.v_heads, c.v_heads),
            self.matrix(c.conv_channels, c.conv_width, dtype=dtypes.float32), self.small(c.v_heads, -7, -2),
            self.small(c.v_heads, -16, -1), self.small(c.state_dim), self.matrix(c.hidden, c.value_width, gain=0.5))

    def attention(self) -> AttentionWeights:
        c, keys = self.config, self.config.kv_heads * self.config.head_dim
        return AttentionWeights(self.inputs(2 * c.heads * c.head_dim, keys, keys), self.small(c.head_dim),
                                self.small(c.head_dim), self.matrix(c.hidden, c.heads * c.head_dim, gain=0.5))

    def experts(self) -> ExpertWeights:
        c = self.config
        return ExpertWeights(
            self.matrix(c.experts, c.hidden, dtype=dtypes.float32),
            self.inputs(c.expert_width, c.expert_width, experts=(c.experts,)),
            self.matrix(c.experts, c.hidden, c.expert_width, gain=0.5),
            self.matrix(c.hidden, dtype=dtypes.float32), self.inputs(c.shared_width, c.shared_width),
            self.matrix(c.hidden, c.shared_width, gain=0.5))

    def layer(self, recurrent: bool) -> LayerWeights:
        mixer = self.delta_net() if recurrent else self.attention()
        return LayerWeights(self.small(self.config.hidden), mixer, self.small(self.config.hidden), self.experts())

    def mtp(self, embed: Tensor, head: Tensor) -> MTPWeights:
        hidden = self.config.hidden
        return MTPWeights(self.small(hidden), self.small(hidden), self.matrix(hidden, 2 * hidden), self.layer(False),
                          self.small(hidden), embed, head)

    def model(self, progress: Callable[[Iterable[bool]], Iterable[bool]] = iter) -> ModelWeights:
        c = self.config
        embed = self.fill((c.vocab, c.hidden), -0.03, 0.03, dtypes.float32)
        head = self.matrix(c.vocab, c.hidden)
        layers = tuple(self.layer(recurrent) for recurrent in progress(c.recurrent))
        return ModelWeights(embed, layers, self.small(c.hidden), head,
                            self.mtp(embed, head) if c.mtp_blocks else None)


def random_weights(config: ModelConfig, format: str = "F16", fused: bool = True, device: str | None = None,
                   progress: Callable[[Iterable[bool]], Iterable[bool]] = iter) -> ModelWeights:
    """Weights of a model's shapes on the device, the same on every call; activations stay finite with them."""
    return RandomWeights(config, weight_format(format), fused, hashed(device)).model(progress)


def tensors_of(record: object) -> Iterator[Tensor]:
    """The tensors of a record of weights, in order; a shared one (a tied head, say) as often as it is used."""
    if isinstance(record, Tensor):
        yield record
    elif isinstance(record, tuple):
        for part in record:
            yield from tensors_of(part)
    elif is_dataclass(record):
        for field in fields(record):
            yield from tensors_of(getattr(record, field.name))


def weight_bytes(record: object) -> int:
    """Bytes of a record's tensors on the device, each once."""
    return sum({id(tensor): tensor.nbytes() for tensor in tensors_of(record)}.values())
