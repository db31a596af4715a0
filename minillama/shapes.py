"""Real models by name, and random weights of their shapes: speed and counts can be had without any file.

The numbers are those of the models' published configurations. Weights are made on the device, one kernel a tensor, by
hashing each value's index: an 80B layer (1.6 billion values) is ready in a moment, and always the same.
"""
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, is_dataclass
from itertools import groupby

import numpy as np
from tinygrad import Tensor, dtypes
from tinygrad.dtype import DType

from minillama.config import MAX_LAYERS, ModelConfig, expected_tensors
from minillama.kernels.layouts import LAYOUTS, Part
from minillama.kernels.packed import Packed
from minillama.quantize import MIXES, quantized_formats
from minillama.weights import (
    AttentionWeights,
    DeltaNetWeights,
    ExpertWeights,
    LayerWeights,
    ModelWeights,
    MTPWeights,
    Weight,
)

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
FLOATS: dict[str, DType] = {"F32": dtypes.float32, "F16": dtypes.float16}
SPREADS = {"Q8_0": 73.9, "Q4_0": 4.61, "Q4_1": 4.61, "Q5_0": 9.23, "Q5_1": 9.23, "Q4_K": 4.61, "Q5_K": 9.23,
           "Q6_K": 18.47}               # standard deviation of a format's quants, where all are equally frequent


def shape_config(name: str, layers: int | None = None, mtp: bool = False) -> ModelConfig:
    """The configuration of a real model, with fewer (or more) layers in the same pattern, with or without its MTP
    block. Raises ValueError, in one line, for a name that is not in SHAPES."""
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r:.60}: the shapes are {', '.join(SHAPES)}")
    if layers is not None and layers > MAX_LAYERS:
        raise ValueError(f"--layers {layers:.3g}: {MAX_LAYERS} at most")
    numbers = SHAPES[name] | ({} if layers is None else {"layers": layers})
    recurrent = tuple((i + 1) % INTERVAL != 0 for i in range(numbers["layers"]))
    return ModelConfig(name=name, mtp_blocks=int(mtp), recurrent=recurrent, **numbers)


def model_name(shape: str, layers: int) -> str:
    """What results call a model of that shape with so many layers."""
    whole = SHAPES[shape]["layers"]
    return shape if layers == whole else f"{shape} {layers} of {whole} layers"


def check_format(name: str, packed: bool, mixes: tuple[str, ...] = MIXES) -> str:
    """The format's name. Raises ValueError, in one line, for one in which no such random weights can be made."""
    known = (*LAYOUTS, *mixes) if packed else FLOATS
    if name not in known:
        raise ValueError(f"--format {name:.30}: random weights come in {', '.join(known)}"
                         + ("" if packed else " (packed ones with --recipe weights=packed)"))
    return name


def parameters(config: ModelConfig, names: Iterable[str] = ("output.weight",)) -> int:
    """How many values a model's weights have; `names` as for `expected_tensors`: here a head of its own."""
    return sum(math.prod(shape) for shape in expected_tensors(config, set(names)).values())


# ---- values -----------------------------------------------------------------------------------------------------

Fill = Callable[[tuple[int, ...], float, float, DType], Tensor]


def hashed(device: str | None = None) -> Fill:
    """A maker of tensors of uniform values between two bounds, each tensor another; one kernel, nothing else stored.
    Between equal bounds all values are that one; unsigned words get random bits, whatever the bounds.

    The bits are those of the integer hash "lowbias32" (C. Wellons, hash-prospector). The number of the tensor goes in
    as data, so that tensors of one shape share a kernel.
    """
    made = 0

    def fill(shape: tuple[int, ...], low: float, high: float, dtype: DType) -> Tensor:
        nonlocal made
        made += 1
        if low == high:
            return Tensor.full(shape, low, dtype=dtype, device=device).contiguous().realize()
        number = Tensor([made], dtype=dtypes.uint32, device=device).realize()
        x = Tensor.arange(math.prod(shape), dtype=dtypes.int32).cast(dtypes.uint32)
        x = x * 0x9e3779b1 + number * 0x85ebca6b
        x = (x ^ (x >> 16)) * 0x7feb352d
        x = (x ^ (x >> 15)) * 0x846ca68b
        if dtype == dtypes.uint32:
            return (x ^ (x >> 16)).reshape(shape).contiguous().realize()
        unit = ((x ^ (x >> 16)) >> 8).float() * 2 ** -24                    # 0 .. 1
        return (unit * (high - low) + low).cast(dtype).reshape(shape).contiguous().realize()
    return fill


def unfilled(device: str | None = None) -> Fill:
    """A maker of tensors that have no values, for counting: on the NULL device they take no memory."""
    return lambda shape, low, high, dtype: Tensor.empty(*shape, dtype=dtype, device=device)


def half_bits(value: float) -> int:
    """The 16 bits of a number as a half."""
    return int(np.float16(value).view(np.uint16))


def random_packed(format: str, shape: tuple[int, ...], deviation: float, fill: Fill) -> Packed:
    """A packed matrix of random quants whose values have mean 0 (nearly) and a standard deviation.

    Scales are the same everywhere, and minima put the middle of the quants at 0; of the six-bit numbers of a K format
    and the bytes of Q6_K, all scales and minima are one number.
    """
    layout, rows, columns = LAYOUTS[format], math.prod(shape[:-1]), shape[-1]
    if format in FLOATS or format == "BF16":
        values = fill((rows, columns), -deviation * 3 ** 0.5, deviation * 3 ** 0.5, dtypes.float32)
        if format == "F32":
            return Packed(format, shape, (values,))
        bits = values.bitcast(dtypes.uint32) >> 16 if format == "BF16" else values.half().bitcast(dtypes.uint16)
        return Packed(format, shape, (layout.parts[0].stored(bits).contiguous().realize(),))

    def words(*parts: Part) -> list[Tensor]:
        return [fill(part.shape(rows, columns), 0, 1, part.dtype) for part in parts]
    d = deviation / SPREADS[format]
    middle = round(SPREADS[format] * 12 ** 0.5) / 2 - 0.5                   # of the quants, where they start at 0

    def halves(*values: float) -> Tensor:
        """The last array: everywhere the same halves."""
        part, shape = layout.parts[-1], layout.parts[-1].shape(rows, columns)
        dtype = part.on(fill((1,), 0, 0, dtypes.uint16).device)
        numbers = list(values) if dtype == part.dtype else [half_bits(value) for value in values]
        if len(numbers) == 1:
            return fill(shape, *numbers * 2, dtype)
        zeros = fill(shape, 0, 0, dtype).reshape(rows, -1, len(numbers))
        return (zeros + Tensor(numbers, dtype=dtype, device=zeros.device)).reshape(rows, -1).contiguous().realize()
    if format == "Q6_K":
        scales = fill(layout.parts[2].shape(rows, columns), 0x40404040, 0x40404040, dtypes.uint32)
        arrays = (*words(*layout.parts[:2]), scales, halves(d / 64))
    elif format.endswith("_K"):
        numbers = fill(layout.parts[-2].shape(rows, columns), 0x2020, 0x2020, layout.parts[-2].dtype)     # all are 32
        arrays = (*words(*layout.parts[:-2]), numbers, halves(d / 32, d / 32 * middle))
    elif format.endswith("_1"):
        arrays = (*words(*layout.parts[:-1]), halves(d, -d * middle))
    else:
        arrays = (*words(*layout.parts[:-1]), halves(d))
    return Packed(format, shape, arrays)


class RandomWeights:
    """Makes the engine's records, packed or plain. What is small is float32, and so are the router and, plain, the
    embedding (of which a step reads one row a token). Rows are scaled by 1 / sqrt(columns), so that every product
    keeps its input's size, and what is added to the residual stream by half of that. Packed, each matrix has the
    format that llama-quantize would give it: the head of a model in Q4_0 is Q6_K, for example."""

    def __init__(self, config: ModelConfig, format: str, fused: bool, packed: bool, fill: Fill):
        self.config, self.format, self.fused, self.packed, self.fill = config, format, fused, packed, fill
        tensors = expected_tensors(config, ("output.weight",))
        self.formats = quantized_formats(tensors, config, format) if packed else {}

    def matrix(self, name: str, *shape: int, gain: float = 1.0, format: str = "") -> Weight:
        """A matrix of the format of the tensor `name`, or of another one."""
        deviation = gain / math.sqrt(shape[-1])
        if self.packed:
            return random_packed(format or self.formats[name], shape, deviation, self.fill)
        bound = 3 ** 0.5 * deviation                                        # uniform to +-b: variance b^2 / 3
        return self.fill(shape, -bound, bound, FLOATS[format or self.format])

    def small(self, *shape: int, low: float = 1.0, high: float = 1.0) -> Tensor:
        return self.fill(shape, low, high, dtypes.float32)

    def inputs(self, *parts: tuple[str, int]) -> tuple[Weight, ...]:
        """Weights that read the hidden state, (tensor, rows) each; fused, neighbours of one format are stacked."""
        runs = ([list(run) for _, run in groupby(parts, lambda part: self.formats.get(part[0]))] if self.fused
                else [[part] for part in parts])
        return tuple(self.matrix(run[0][0], sum(rows for _, rows in run), self.config.hidden) for run in runs)

    def pair(self, at: str, kind: str, *shape: int) -> tuple[Weight, ...]:
        """Gate and up of a gated network (..., width, hidden): two, or one where plain projections are fused."""
        if self.fused and not self.packed:
            return (self.matrix("", *shape[:-2], 2 * shape[-2], shape[-1]),)
        return tuple(self.matrix(f"{at}ffn_{part}_{kind}.weight", *shape) for part in ("gate", "up"))

    def delta_net(self, at: str) -> DeltaNetWeights:
        c, ba = self.config, at + "ssm_ba.weight"
        return DeltaNetWeights(
            self.inputs((at + "attn_qkv.weight", c.conv_channels), (at + "attn_gate.weight", c.value_width),
                        (ba, c.v_heads), (ba, c.v_heads)),
            self.small(c.conv_channels, c.conv_width, low=-0.87, high=0.87), self.small(c.v_heads, low=-7, high=-2),
            self.small(c.v_heads, low=-16, high=-1), self.small(c.state_dim),
            self.matrix(at + "ssm_out.weight", c.hidden, c.value_width, gain=0.5))

    def attention(self, at: str) -> AttentionWeights:
        c, keys = self.config, self.config.kv_heads * self.config.head_dim
        return AttentionWeights(
            self.inputs((at + "attn_q.weight", 2 * c.heads * c.head_dim), (at + "attn_k.weight", keys),
                        (at + "attn_v.weight", keys)),
            self.small(c.head_dim), self.small(c.head_dim),
            self.matrix(at + "attn_output.weight", c.hidden, c.heads * c.head_dim, gain=0.5))

    def experts(self, at: str) -> ExpertWeights:
        c = self.config
        return ExpertWeights(
            self.matrix("", c.experts, c.hidden, format="F32"),
            self.pair(at, "exps", c.experts, c.expert_width, c.hidden),
            self.matrix(at + "ffn_down_exps.weight", c.experts, c.hidden, c.expert_width, gain=0.5),
            self.small(c.hidden, low=-(3 / c.hidden) ** 0.5, high=(3 / c.hidden) ** 0.5),
            self.pair(at, "shexp", c.shared_width, c.hidden),
            self.matrix(at + "ffn_down_shexp.weight", c.hidden, c.shared_width, gain=0.5))

    def layer(self, index: int) -> LayerWeights:
        at, c = f"blk.{index}.", self.config
        mixer = self.delta_net(at) if index < c.layers and c.recurrent[index] else self.attention(at)
        return LayerWeights(self.small(c.hidden), mixer, self.small(c.hidden), self.experts(at))

    def mtp(self, embed: Weight, head: Weight) -> MTPWeights:
        index, hidden = self.config.layers, self.config.hidden
        project = self.matrix(f"blk.{index}.nextn.eh_proj.weight", hidden, 2 * hidden)
        return MTPWeights(self.small(hidden), self.small(hidden), project, self.layer(index), self.small(hidden),
                          embed, head)

    def model(self, progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> ModelWeights:
        c = self.config
        embed = self.matrix("token_embd.weight", c.vocab, c.hidden, gain=0.02 * c.hidden ** 0.5,
                            format="" if self.packed else "F32")
        head = self.matrix("output.weight", c.vocab, c.hidden)
        layers = tuple(self.layer(index) for index in progress(range(c.layers)))
        return ModelWeights(embed, layers, self.small(c.hidden), head,
                            self.mtp(embed, head) if c.mtp_blocks else None)


def random_weights(config: ModelConfig, format: str = "F16", fused: bool = True, packed: bool = False,
                   device: str | None = None, *,
                   progress: Callable[[Iterable[int]], Iterable[int]] = iter) -> ModelWeights:
    """Weights of a model's shapes on the device, the same on every call; activations stay finite with them."""
    return RandomWeights(config, check_format(format, packed), fused, packed, hashed(device)).model(progress)


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
