"""The row-wise maths that every layer shares: norms, rotary embedding, products, the gated activation.

Everything here works on the last dimension alone, whatever stands before it: (tokens, hidden) when serving,
(tokens, batch, hidden) when training.
"""
import numpy as np
from tinygrad import Tensor, dtypes


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to root mean square 1, then by `weight`. x (..., dim), weight (dim,).

    The checkpoints store `weight - 1` (the "zero-centred" norm); the conversion to GGUF has added the 1 already.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    return x * (x.square().mean(axis=-1, keepdim=True) + eps).rsqrt() * weight


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale rows to length 1. x (..., dim); `eps` stands inside the root, as in the reference model."""
    return x * (x.square().sum(axis=-1, keepdim=True) + eps).rsqrt()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x (..., columns) times weight (..., rows, columns) transposed: (..., rows), float32.

    A 16-bit weight (training on a GPU) rounds x to its own format for the product; sums stay float32.
    """
    return x.cast(weight.dtype).matmul(weight.transpose(-1, -2), dtype=dtypes.float32)


def project(x: Tensor, weights: tuple[Tensor, ...], widths: tuple[int, ...]) -> list[Tensor]:
    """Several products of the same x: one weight per width, or one weight that holds all rows (then x is read once).

    x (..., columns), weights (width, columns) each or (sum of widths, columns); returns (..., width) each.
    """
    if len(weights) == 1 < len(widths):
        return list(linear(x, weights[0]).split(widths, dim=-1))
    return [linear(x, weight) for weight in weights]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, elementwise. Source: Shazeer 2020, "GLU variants improve transformer"."""
    return gate.silu() * up


def rope_table(positions: int, dims: int, base: float, device: str | None = None) -> Tensor:
    """Cosines and sines of every position's angles, (positions, 2, dims // 2), float32.

    Computed on the host in double precision: at position 262,143 a float32 angle is wrong by 0.01.
    Source: Su et al. 2021, eq. 15.
    """
    angles = np.arange(positions)[:, None] * base ** (-np.arange(0, dims, 2) / dims)     # (positions, dims // 2)
    return Tensor(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32), device=device).realize()


def rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotate the first dimensions of each head by their position; the rest passes ("partial" rotary embedding).

    x (tokens, heads, dim), table (tokens, 2, dims // 2) with dims <= dim. Dimension i is paired with i + dims // 2
    ("half-split", NEOX).
    """
    half = table.shape[-1]
    cos, sin = table[:, :1], table[:, 1:]                                   # (tokens, 1, half): the same for all heads
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return (a * cos - b * sin).cat(b * cos + a * sin, rest, dim=-1)
