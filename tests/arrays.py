"""Random arrays for the tests of kernels, and how far a result is off."""
import numpy as np
import pytest
from tinygrad import Device, Tensor, dtypes

from minillama.blocks import FORMATS
from minillama.kernels import tuning
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.packed import Packed
from minillama.packers import pack

TOLERANCE = 5e-6        # relative to the largest value; float32 sums in another order differ by some 1e-6


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(numbers(*shape, seed=seed)).realize()


def integers(*shape: int, below: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)).realize()


def packed(format: str, *shape: int, seed: int = 0) -> Packed:
    """A matrix of random values, rows of very different size, packed by the file's rules."""
    values = numbers(*shape, seed=seed) * 10.0 ** np.random.default_rng(seed).integers(-2, 2, (*shape[:-1], 1))
    return from_raw(pack(values.astype(np.float32), FORMATS[format]), format, *shape)


def from_raw(raw: np.ndarray, format: str, *shape: int) -> Packed:
    return Packed.from_bytes(Tensor(raw.reshape(int(np.prod(shape[:-1])), -1)), format, shape)


def unfilled(format: str, *shape: int) -> Packed:
    """A packed matrix without values on a CUDA device, which need not be here: for rendering."""
    rows = shape[0] if len(shape) == 2 else shape[0] * shape[1]
    parts = LAYOUTS[format].parts
    return Packed(format, shape, tuple(Tensor.empty(*part.shape(rows, shape[-1]), dtype=part.on("CUDA"), device="CUDA")
                                       for part in parts))


def empty(*shape: int, dtype=dtypes.float32) -> Tensor:
    """Likewise a tensor."""
    return Tensor.empty(*shape, dtype=dtype, device="CUDA")


def off(got: Tensor, want: Tensor | np.ndarray) -> float:
    """Largest |difference|, relative to the largest wanted value."""
    got, want = got.numpy(), want if isinstance(want, np.ndarray) else want.numpy()
    assert got.shape == want.shape and np.isfinite(got).all()
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def threads_share(monkeypatch):
    """Kernels as on a GPU: lanes share sums, quants stay where they are, products take norms."""
    if not Device[Device.DEFAULT].renderer.has_local:
        pytest.skip("no memory that threads share on this device")
    monkeypatch.setitem(tuning.SPREADS, "CL", tuning.GPU)
    monkeypatch.setattr(tuning, "SHARING", (*tuning.SHARING, "CL"))
    monkeypatch.setattr(tuning, "multiplies_subnormals", tuning.shares_memory)
    monkeypatch.setattr(tuning, "norms_inside", lambda device, tokens: tuning.shares_memory(device))
