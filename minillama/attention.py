"""Gated attention: few key/value heads for many query heads, a partial rotary embedding, a gate on the output.

Source: Ainslie et al. 2023 (grouped queries); Qiu et al. 2025, "Gated attention for large language models".
"""
from tinygrad import Tensor, UOp

from minillama.config import ModelConfig
from minillama.kernels import attention as kernels
from minillama.kernels import flash, flash_loops, tensor_cores, tuning
from minillama.kernels.packed import Packed
from minillama.kernels.product import Column, Normed
from minillama.kernels.tuning import FEW
from minillama.layers import columns, linear, project, rms_norm, rope
from minillama.state import KVCache, KVChain
from minillama.weights import AttentionWeights, Weight

BLOCK = 64      # rows of a cache that a prompt looks at together


def attend(q: Tensor, k: Tensor, v: Tensor, start: int | UOp) -> Tensor:
    """Causal attention of tokens start.. over positions 0 .. start + tokens.

    q (tokens, heads, dim); k, v (positions, kv_heads, dim) with positions = start + tokens; query head h reads KV head
    h // (heads / kv_heads). Returns (tokens, heads, dim).
    """
    tokens, heads, dim = q.shape
    positions, kv_heads, _ = k.shape
    group = heads // kv_heads
    q = q.reshape(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(kv_heads, group * tokens, dim)
    scores = q @ k.permute(1, 2, 0) * dim ** -0.5                           # (kv_heads, group * tokens, positions)
    if tokens > 1:
        row = Tensor.arange(tokens).reshape(1, 1, tokens, 1) + start
        longest = positions if isinstance(positions, int) else positions.vmax   # a count of unknown end costs n² sums
        seen = Tensor.arange(longest)[:positions].reshape(1, 1, 1, positions) <= row
        scores = seen.where(scores.reshape(kv_heads, group, tokens, positions), float("-inf"))
        scores = scores.reshape(kv_heads, group * tokens, positions)
    out = scores.softmax(-1) @ v.permute(1, 0, 2)                           # (kv_heads, group * tokens, dim)
    return out.reshape(kv_heads, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)


def attend_in_blocks(q: Tensor, keys: Tensor, values: Tensor, start: int | UOp) -> Tensor:
    """`attend` for many tokens at a position that is a variable: over all rows of a cache (positions, kv_heads, dim),
    positions a multiple of BLOCK, whose rows behind the text may hold anything.

    The rows that count are taken in whole blocks: then only the number of blocks varies, and a compiler can unroll and
    tile what is inside, which has a fixed size.
    """
    (tokens, heads, dim), (positions, kv_heads, _) = q.shape, keys.shape
    group, most = heads // kv_heads, positions // BLOCK
    blocks = (start + (tokens + BLOCK - 1)) // BLOCK
    k, v = (part.reshape(most, BLOCK, kv_heads, dim)[:blocks].permute(0, 2, 1, 3).float() for part in (keys, values))
    rows = group * tokens                                                   # of queries that share their keys
    q = q.reshape(tokens, kv_heads, group, dim).permute(1, 2, 0, 3).reshape(1, kv_heads, rows, dim).contiguous()
    units = rows >= 32 and dim % 16 == 0 and tuning.multiplies_halves(q.device, rows)
    scores = tensor_cores.product(q, k) if units else q @ k.transpose(-1, -2)
    scores = scores * dim ** -0.5                                           # (blocks, kv_heads, rows, BLOCK)
    seen = Tensor.arange(positions).reshape(most, 1, 1, 1, BLOCK)[:blocks] <= (
        Tensor.arange(tokens).reshape(1, 1, 1, tokens, 1) + start)
    scores = seen.where(scores.reshape(blocks, kv_heads, group, tokens, BLOCK), float("-inf")).contiguous()
    parts = (scores - scores.max((0, -1), keepdim=True)).exp()
    parts = (parts if units else parts.contiguous()).reshape(blocks, kv_heads, rows, BLOCK)
    if units:       # in one sum over all positions: the optimizer puts no other on the units
        factors = tensor_cores.fours(parts), tensor_cores.fours(v.transpose(-1, -2), second=True)
        out = tensor_cores.multiplied(*(x.permute(1, 2, 0, 3).reshape(kv_heads, x.shape[2], blocks * 4 * BLOCK)
                                        for x in factors))                  # (kv_heads, rows, dim)
    else:
        out = (parts @ v).sum(0)                                            # (kv_heads, rows, dim)
    out = out / parts.sum((0, -1)).unsqueeze(-1)
    return out.reshape(kv_heads, group, tokens, dim).permute(2, 0, 1, 3).reshape(tokens, heads, dim)


def over_cache(q: Tensor, gate: Tensor, keys: Tensor, values: Tensor, start: int | UOp) -> Tensor:
    """Gated attention of tokens start.. over a cache (positions, kv_heads, dim) whose rows behind them may hold
    anything. q, gate (tokens, heads, dim); returns that shape."""
    if q.shape[0] > 1 and isinstance(start, UOp) and keys.shape[0] % BLOCK == 0:
        return attend_in_blocks(q, keys, values, start) * gate.sigmoid()
    end = start + q.shape[0]
    return attend(q, keys[:end].float(), values[:end].float(), start) * gate.sigmoid()


def keys_and_values(x: Tensor, w: AttentionWeights, config: ModelConfig, table: Tensor) -> tuple[Tensor, ...]:
    """The projections of x (tokens, ..., hidden): q, gate (tokens, heads, dim) and k, v (tokens, kv_heads, dim).

    q and k are normalised per head and rotated by `table` (tokens, 2, rope_dim // 2). A batch folds into the heads.
    """
    tokens, c = x.shape[0], config
    q, k, v = project(x, w.inputs, (2 * c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim))
    q, gate = q.reshape(tokens, -1, 2 * c.head_dim).chunk(2, dim=-1)        # per head: [query | gate]
    q = rope(rms_norm(q, w.q_norm, c.norm_eps), table)
    k = rope(rms_norm(k.reshape(tokens, -1, c.head_dim), w.k_norm, c.norm_eps), table)
    return q, gate, k, v.reshape(tokens, -1, c.head_dim)


def attention(x: Tensor, w: AttentionWeights, config: ModelConfig, table: Tensor, start: int | UOp = 0,
              cache=None, residual: Tensor | None = None) -> Tensor:
    """One gated attention mixer, plus `residual`. x (tokens, ..., hidden) at positions start..; returns that shape.

    `cache.store(k, v, start)` stores the new rows and returns all there are; without a cache the text starts here.
    """
    q, gate, k, v = keys_and_values(x, w, config, table)
    out = over_cache(q, gate, *((k, v) if cache is None else cache.store(k, v, start)), start)
    return linear(out.reshape(*x.shape[:-1], config.heads * config.head_dim), w.out, residual)


def can_step(config: ModelConfig, cache: KVCache) -> bool:
    """Whether `attention_step` can attend with kernels of its own, for this model over such a cache."""
    return tuning.shares_memory(cache.keys.device) and kernels.fits(
        config.heads, config.kv_heads, config.head_dim, cache.keys.shape[0])


def can_flash(tokens: int, config: ModelConfig, cache: KVCache) -> bool:
    """Whether `attention_step` can attend for a prompt: for so many tokens, over such a cache."""
    positions, kv_heads, dim = cache.keys.shape
    return tokens > FEW and (flash.fits(cache.keys.device, tokens, config.heads, kv_heads, dim, positions)
                             or flash_loops.fits(cache.keys.device, tokens, positions))


def attention_step(x: Tensor | Normed, w: AttentionWeights, config: ModelConfig, table: Tensor, cache,
                   position: Tensor, residual: Tensor, start: int | UOp) -> Tensor:
    """`attention` for a few tokens, in six kernels where `can_step`, else in nine; for more where `can_flash`. x and
    residual (tokens, hidden); table (positions, 2, rope_dim // 2), of all positions; position (1,) int32 is that of
    the first token, `start` the same as a number or variable, which only the nine need."""
    c, (tokens, _) = config, x.shape
    keys = c.kv_heads * c.head_dim
    (q, at), k, v = columns(x, w.inputs, (2 * c.heads * c.head_dim, keys, keys))    # q: per head [query | gate]
    turned = Tensor.empty(tokens, c.heads, c.head_dim, device=x.device)
    turned, = kernels.rotated((q, at), w.q_norm, c.norm_eps, table, c.heads, 2 * c.head_dim, position, turned)
    rows, values = cached_heads(k, v, w, config, table, cache, position)
    if can_flash(tokens, c, cache):
        form = flash if tuning.shares_memory(x.device) else flash_loops
        y = form.attend(turned, rows, values, (q, at + c.head_dim), 2 * c.head_dim, position)
    elif can_step(c, cache):
        y = kernels.attend(turned, rows, values, (q, at + c.head_dim), 2 * c.head_dim, position)
    else:
        gate = q[:, at:at + 2 * c.heads * c.head_dim].reshape(tokens, c.heads, -1)[..., c.head_dim:]
        y = over_cache(turned, gate, rows, values, start).reshape(tokens, -1)
    return linear(y, w.out, residual)


def cached_heads(k: Column, v: Column, w: AttentionWeights, config: ModelConfig, table: Tensor, cache,
                 position: Tensor) -> tuple[Tensor, Tensor]:
    """Norm and rotate keys, and store them and values from `position` on. Returns the cache's buffers with them."""
    c = config
    keys, values = kernels.rotated(k, w.k_norm, c.norm_eps, table, c.kv_heads, c.head_dim, position, cache.keys,
                                   (v, cache.values))
    cache.wrote(keys, values)
    return keys, values


def remember(x: Tensor, w: AttentionWeights, kv: tuple[Weight, ...], config: ModelConfig, table: Tensor, at,
             cache: KVChain) -> None:
    """Only store keys and values of x (tokens, hidden), whose tokens are looked back at and need not look themselves.

    kv: the rows of `w.inputs` that make keys and values; table (positions, 2, rope_dim // 2), of all positions; `at`:
    the model's Place.
    """
    c, width = config, config.kv_heads * config.head_dim
    if x.shape[0] <= FEW and isinstance(kv[0], Packed):
        cached_heads(*columns(x, kv, (width, width)), w, c, table, cache, at.position)
        return
    k, v = (part.reshape(x.shape[0], -1, c.head_dim) for part in project(x, kv, (width, width)))
    cache.write(rope(rms_norm(k, w.k_norm, c.norm_eps), at.rows(table)), v, at.start)
