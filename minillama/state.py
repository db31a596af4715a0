"""What the model remembers of a text: keys and values of the attention layers, windows and memories of the delta nets.

All of it lives on the device and is written in place, inside the graph of the step that computes it.
"""
from dataclasses import dataclass

import numpy as np
from tinygrad import Device, Tensor, UOp, dtypes

from minillama.config import ModelConfig
from minillama.kernels.delta import HISTORY


def put(tensor: Tensor, values: np.ndarray) -> Tensor:
    """Overwrite a realized tensor, which takes far less Python than a new one. Waits for whoever still reads it.
    values: as many of the same type, contiguous."""
    buffer = tensor.uop.buffer
    Device[buffer.device].synchronize()
    buffer.allocator._copyin(buffer._buf, memoryview(values).cast("B"))
    return tensor


def padded(ids: list[int], size: int) -> np.ndarray:
    """ids as (size,) int32, 0 behind them."""
    return np.array(ids + [0] * (size - len(ids)), dtype=np.int32)


def stored(buffer: Tensor, values: Tensor, rows: slice | None = None) -> Tensor:
    """The buffer after `values` were written into it (or into a slice of its rows), as part of the graph being built.

    The scheduler lets all reads of the old contents finish first: that needs the write to be named as this buffer's.
    """
    target = buffer if rows is None else buffer[rows]
    return Tensor(buffer.uop.after(target.uop.store(values.cast(buffer.dtype).uop)))


def after(x: Tensor, *writes: Tensor) -> Tensor:
    """A copy of x that is ordered behind the `writes` (results of `stored`), and so are its readers.

    The kernel that fills its buffer waits for the writes. `x.contiguous().uop.after(write)` looks the same but is not:
    the scheduler then orders the reader behind neither (tinygrad 0.14).
    """
    fresh = Tensor.invalids(*x.shape, dtype=x.dtype, device=x.device).uop
    return Tensor(fresh.after(fresh.src[0].store(x.uop), *(write.uop for write in writes)))


@dataclass(frozen=True)
class KVCache:
    """Keys and values of one attention layer, (positions, kv_heads, head_dim) each.

    Rows past the text may hold leftovers of padded or rejected tokens: the causal mask hides them until they are
    overwritten.
    """
    keys: Tensor
    values: Tensor

    def store(self, k: Tensor, v: Tensor, start: int | UOp) -> tuple[Tensor, Tensor]:
        """Store rows k, v (tokens, kv_heads, head_dim) at positions start.. and return the buffers with them."""
        end = start + k.shape[0]
        keys = stored(self.keys, k, slice(start, end))
        values = stored(self.values, v, slice(start, end))
        self.wrote(keys, values)
        return keys, values

    def write(self, k: Tensor, v: Tensor, start: int | UOp) -> tuple[Tensor, Tensor]:
        """The same, and return all rows up to their end."""
        end = start + k.shape[0]
        keys, values = self.store(k, v, start)
        return keys[:end].float(), values[:end].float()

    def wrote(self, keys: Tensor, values: Tensor) -> None:
        """Told what the buffers are after a write: the next graph finds them so by itself."""

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values


class KVChain(KVCache):
    """A cache that several steps of one graph write, one after the other: each sees what those before it wrote."""

    def wrote(self, keys: Tensor, values: Tensor) -> None:
        object.__setattr__(self, "keys", keys)
        object.__setattr__(self, "values", values)


@dataclass(frozen=True)
class Pending:
    """What the MTP block has not read of the text yet: the model's hidden states of its last positions (rows, hidden)
    and, behind each, the token that follows it (rows,) int32. A draft starts from the last row that is part of the
    text; the rows behind that were rejected."""
    tokens: Tensor
    hidden: Tensor

    @classmethod
    def zeros(cls, rows: int, hidden: int, device: str | None = None) -> "Pending":
        return cls(Tensor.zeros(rows, dtype=dtypes.int32, device=device).contiguous().realize(),
                   Tensor.zeros(rows, hidden, dtype=dtypes.float32, device=device).contiguous().realize())


@dataclass(frozen=True)
class DeltaState:
    """One Gated DeltaNet layer: the convolution's last inputs (conv_width - 1, conv_channels) and the memory
    (v_heads, state_dim, state_dim), rows being key dimensions. Its size does not depend on the text's length."""
    window: Tensor
    memory: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.window, self.memory


@dataclass(frozen=True)
class DeltaRings:
    """One Gated DeltaNet layer as its kernels keep it, indexed by position: the last inputs of the convolution
    (HISTORY, conv_channels), and memories (slots, v_heads, state_dim, state_dim), slot p % slots the one before the
    token at position p. Stepping back is going on at an earlier position; nothing is copied."""
    history: Tensor
    memories: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        return self.history, self.memories


@dataclass(frozen=True)
class State:
    """The state of the whole model for one text of up to `positions` tokens: the context and one padded batch."""
    layers: tuple[KVCache | DeltaState | DeltaRings, ...]
    mtp: KVCache | None
    positions: int

    @classmethod
    def zeros(cls, config: ModelConfig, positions: int, device: str | None = None, slots: int = 0) -> "State":
        """The state before the first token. `slots`: of the delta nets' rings; 0: they have none."""
        def buffer(*shape: int) -> Tensor:
            return Tensor.zeros(*shape, dtype=dtypes.float32, device=device).contiguous().realize()

        def cache() -> KVCache:
            shape = positions, config.kv_heads, config.head_dim
            return KVCache(buffer(*shape), buffer(*shape))

        def delta() -> DeltaState | DeltaRings:
            if slots:
                return DeltaRings(buffer(HISTORY, config.conv_channels),
                                  buffer(slots, config.v_heads, config.state_dim, config.state_dim))
            return DeltaState(buffer(config.conv_width - 1, config.conv_channels),
                              buffer(config.v_heads, config.state_dim, config.state_dim))
        layers = tuple(delta() if recurrent else cache() for recurrent in config.recurrent)
        return cls(layers, cache() if config.mtp_blocks else None, positions)

    def tensors(self) -> list[Tensor]:
        parts = [*self.layers, *([self.mtp] if self.mtp else [])]
        return [tensor for part in parts for tensor in part.tensors()]

    def clear(self) -> None:
        """Forget the text. Only the delta nets' state must be zeroed; stale keys are never seen."""
        for layer in self.layers:
            if not isinstance(layer, KVCache):
                Tensor.realize(*(t.assign(Tensor.zeros(*t.shape, device=t.device)) for t in layer.tensors()))

    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(tensor.nbytes() for tensor in self.tensors())
