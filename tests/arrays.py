"""Random arrays for the tests of kernels, and how far a result is off."""
import numpy as np
import pytest
from tinygrad import Device, Tensor

from minillama.kernels import tuning

TOLERANCE = 5e-6        # relative to the largest value; float32 sums in another order differ by some 1e-6


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return Tensor(numbers(*shape, seed=seed)).realize()


def integers(*shape: int, below: int, seed: int = 0) -> Tensor:
    return Tensor(np.random.default_rng(seed).integers(0, below, shape).astype(np.int32)).realize()


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
    monkeypatch.setattr(tuning, "norms_inside", tuning.shares_memory)
