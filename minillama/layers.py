"""The row-wise maths that every layer shares: norms, rotary embedding, products, the gated activation.

Everything here works on the last dimension alone, whatever stands before it: (tokens, hidden) when serving,
(tokens, batch, hidden) when training.
"""
import numpy as np
from tinygrad import Tensor, dtypes

from minillama.kernels import gemm, halves, panels, product, tensor_cores, tuning
from minillama.kernels.cores import on_cpu
from minillama.kernels.packed import Packed, rows_of, unpacked
from minillama.kernels.product import Column, Normed
from minillama.kernels.tuning import FEW


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale rows to root mean square 1, then by `weight`. x (..., dim), weight (dim,).

    The checkpoints store `weight - 1` (the "zero-centred" norm); the conversion to GGUF has added the 1 already.
    Source: Zhang & Sennrich 2019, eq. 4.
    """
    return x * (x.square().mean(axis=-1, keepdim=True) + eps).rsqrt() * weight


def l2_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Scale rows to length 1. x (..., dim); `eps` stands inside the root, as in the reference model."""
    squares = x.square().sum(axis=-1, keepdim=True)
    if tuning.shares_memory(x.device):      # left to itself, the optimizer has a few threads sum up all rows
        squares = squares.contiguous(arg=tuning.grouped(tuning.lanes(x.device, x.shape[-1])))
    return x * (squares + eps).rsqrt()


def linear(x: Tensor | Normed, weight: Tensor | Packed, residual: Tensor | None = None) -> Tensor:
    """x (..., columns) times weight (..., rows, columns) transposed, plus `residual`: (..., rows), float32.

    A 16-bit weight (training on a GPU) rounds x to its own format for the product; sums stay float32.
    """
    if isinstance(weight, Packed):
        return packed_linear(x, weight, residual)
    y = x.cast(weight.dtype).matmul(weight.transpose(-1, -2), dtype=dtypes.float32)
    return y if residual is None else y + residual


def packed_linear(x: Tensor | Normed, weight: Packed, residual: Tensor | None = None) -> Tensor:
    """`linear` with a packed weight (rows, columns). Where the norm of x is still to be taken, for a few tokens."""
    if isinstance(x, Normed):
        return product.linear(x, weight, residual)
    shape = *x.shape[:-1], weight.rows
    x = x.reshape(-1, weight.columns)                                       # (tokens, columns)
    more = None if residual is None else residual.reshape(-1, weight.rows)
    if x.shape[0] <= FEW:
        return product.linear(x, weight, more).reshape(shape)
    if tuning.uses_mma(x.device) and x.shape[0] % 8 == 0 and halves.fits(weight):
        return gemm.linear(halves.halves(x, weight.layout), weight, more).reshape(shape)
    # a unit takes the rows of eight tokens
    units = tuning.multiplies_halves(x.device, weight.rows) and x.shape[0] % 8 == 0
    if units and tensor_cores.fits(weight):
        return tensor_cores.linear(tensor_cores.halves(x), weight, more).reshape(shape)
    if on_cpu(x.device):
        return panels.linear(x, weight, more).reshape(shape)
    y = tensor_cores.long_product(x, unpacked(weight)) if units else x @ unpacked(weight).T     # (tokens, rows)
    return (y if more is None else y + more).reshape(shape)


def lookup(table: Tensor | Packed, ids: Tensor) -> Tensor:
    """Rows of a table (vocab, columns) by number, (tokens, columns) float32. ids (tokens,) int32."""
    return rows_of(table, ids) if isinstance(table, Packed) else table[ids]


def columns(x: Tensor | Normed, weights: tuple[Tensor | Packed, ...], widths: tuple[int, ...]) -> list[Column]:
    """Several products of the same x (tokens, hidden), each a run of columns of some buffer: weights may hold the rows
    of several widths, stacked."""
    runs, places = [], iter(widths)
    for weight in weights:
        y, first, rows = linear(x, weight), 0, weight.shape[-2]
        while first < rows:
            runs.append((y, first))
            first += next(places)
    return runs


def project(x: Tensor, weights: tuple[Tensor | Packed, ...], widths: tuple[int, ...]) -> list[Tensor]:
    """The same, each by itself: x (..., hidden); returns (..., width) each. Where one weight holds all rows, x is read
    once."""
    return [y[..., first:first + width] for (y, first), width in zip(columns(x, weights, widths), widths, strict=True)]


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
