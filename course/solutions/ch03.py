"""Solutions of chapter 03's exercises."""
import numpy as np
from tinygrad import Tensor


def norm_of_checkpoint(x: Tensor, stored: Tensor, eps: float) -> Tensor:
    """The checkpoint stores the distance from 1."""
    return x * (x.square().mean(axis=-1, keepdim=True) + eps).rsqrt() * (1 + stored)


def shared_scores(q: Tensor, k: Tensor) -> Tensor:
    """Queries that share keys become rows of one product; a view of q, and k is read where it lies."""
    tokens, heads, dim = q.shape
    positions, kv_heads, _ = k.shape
    q = q.reshape(tokens, kv_heads, heads // kv_heads, dim).permute(1, 2, 0, 3).reshape(kv_heads, -1, dim)
    return (q @ k.permute(1, 2, 0)).reshape(heads, tokens, positions)


def window(tokens: int, start: int, width: int) -> np.ndarray:
    """Not later than the token itself, and less than `width` back."""
    back = start + np.arange(tokens)[:, None] - np.arange(start + tokens)
    return (back >= 0) & (back < width)


def unrotate(x: Tensor, table: Tensor) -> Tensor:
    """A turn by the opposite angle: the cosine is the same, the sine changes its sign."""
    half = table.shape[-1]
    cos, sin = table[:, :1], -table[:, 1:]
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return (a * cos - b * sin).cat(b * cos + a * sin, rest, dim=-1)
