"""Gated attention: its products against numpy, the rotary angles against their formula, the cache, the batch."""
import numpy as np
import oracle
import pytest
from oracle import difference
from tinygrad import Tensor, UOp

from minillama.attention import BLOCK, attend, attend_in_blocks, attention
from minillama.layers import l2_norm, rms_norm, rope, rope_table
from minillama.state import KVCache

HEADS, KV_HEADS, DIM = 4, 2, 32     # as in ref-a
TOLERANCE = 1e-5


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def attend_in_numpy(q: np.ndarray, k: np.ndarray, v: np.ndarray, start: int) -> np.ndarray:
    """One query at a time, in float64."""
    tokens, heads, dim = q.shape
    out = np.zeros(q.shape)
    for t in range(tokens):
        for head in range(heads):
            mine = head // (heads // k.shape[1])
            keys, values = (x[:start + t + 1, mine].astype(np.float64) for x in (k, v))
            scores = keys @ q[t, head] / np.sqrt(dim)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights @ values / weights.sum()
    return out


@pytest.mark.parametrize(("start", "tokens"), ((0, 1), (5, 1), (5, 7)))
def test_attention_equals_numpy_and_sees_no_later_position(start, tokens):
    q, k, v = (numbers(rows, heads, DIM, seed=heads + rows) for rows, heads in
               ((tokens, HEADS), (start + tokens, KV_HEADS), (start + tokens, KV_HEADS)))
    got = attend(Tensor(q), Tensor(k), Tensor(v), start).numpy()
    assert difference(got, attend_in_numpy(q, k, v, start)) <= TOLERANCE


@pytest.mark.parametrize(("start", "tokens"), ((0, 3), (60, 7), (BLOCK - 5, 5), (2 * BLOCK, 70)))
def test_attention_in_blocks_equals_numpy_whatever_lies_behind_the_text(start, tokens):
    q, k, v = numbers(tokens, HEADS, DIM), *(numbers(4 * BLOCK, KV_HEADS, DIM, seed=seed) * 9 for seed in (1, 2))
    place = UOp.variable("start", 0, 3 * BLOCK).bind(start)
    got = attend_in_blocks(Tensor(q), Tensor(k).realize(), Tensor(v).realize(), place).numpy()
    assert difference(got, attend_in_numpy(q, k, v, start)) <= 9 * TOLERANCE


def test_large_scores_do_not_overflow():
    q, k, v = numbers(3, HEADS, DIM) * 100, numbers(3, KV_HEADS, DIM) * 100, numbers(3, KV_HEADS, DIM)
    got = attend(Tensor(q), Tensor(k), Tensor(v), 0).numpy()
    assert difference(got, attend_in_numpy(q, k, v, 0)) <= 1e-3


# ---- the rotary embedding ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", (0, 1, 4095, 262143))
def test_rope_equals_its_formula_even_at_large_positions(position):
    x, dims, base = numbers(1, HEADS, DIM), 8, 1e7
    table = rope_table(position + 1, dims, base)
    got = rope(Tensor(x), table[position:position + 1]).numpy()[0]
    pairs = x[0, :, :dims // 2] + 1j * x[0, :, dims // 2:dims]              # dimension i with i + dims // 2
    turned = pairs * np.exp(1j * position * np.float64(base) ** (-np.arange(0, dims, 2) / dims))
    assert difference(got[:, :dims], np.concatenate([turned.real, turned.imag], axis=1)) <= 5e-6
    assert np.array_equal(got[:, dims:], x[0, :, dims:]), "dimensions past the rotated ones must pass unchanged"


def test_products_of_rotated_rows_depend_on_the_distance_alone():
    table = rope_table(4096, DIM, 1e4)
    q, k = (rope(Tensor(np.repeat(numbers(1, 1, DIM, seed=seed), 2, axis=0)), table[start:start + 3990:3989]).numpy()
            for seed, start in ((1, 20), (2, 3)))                           # positions 20, 4009 and 3, 3992
    near, far = (float((q[i] * k[i]).sum()) for i in (0, 1))
    assert abs(near - far) <= 1e-4, (near, far)


def test_norms_of_rows_near_zero_are_finite_and_as_the_formula_says():
    x = np.stack([numbers(32), numbers(32) * 1e-4, np.zeros(32, dtype=np.float32)])
    weight = numbers(32, seed=1)
    rms = x / np.sqrt((x.astype(np.float64) ** 2).mean(axis=1, keepdims=True) + 1e-6) * weight
    length = x / np.sqrt((x.astype(np.float64) ** 2).sum(axis=1, keepdims=True) + 1e-6)
    assert difference(rms_norm(Tensor(x), Tensor(weight), 1e-6).numpy(), rms) <= TOLERANCE
    assert difference(l2_norm(Tensor(x)).numpy(), length) <= TOLERANCE


# ---- the layer ---------------------------------------------------------------------------------------------------


def layer(x: np.ndarray, start: int = 0, cache: KVCache | None = None) -> np.ndarray:
    """The first attention layer of ref-a on x (tokens, ..., hidden)."""
    engine = oracle.shared_engine()
    mixer = engine.weights.layers[engine.config.recurrent.index(False)].mixer
    return attention(Tensor(x), mixer, engine.config, engine.table[start:start + len(x)], start, cache).numpy()


def test_a_batch_of_sequences_gives_what_each_gives_alone():
    x = numbers(8, 3, oracle.shared_engine().config.hidden)
    together = layer(x)
    for i in range(3):
        assert difference(together[:, i], layer(x[:, i])) <= 1e-4


def test_a_layer_that_goes_on_from_its_cache_gives_what_the_whole_sequence_gives():
    x = numbers(12, oracle.shared_engine().config.hidden)
    cache = KVCache(*(Tensor.zeros(20, KV_HEADS, DIM).contiguous().realize() for _ in range(2)))
    whole = layer(x)
    parts = [layer(x[:8], 0, cache), layer(x[8:], 8, cache)]
    assert difference(np.concatenate(parts), whole) <= 1e-4


def test_leftovers_in_the_cache_past_the_text_are_not_seen():
    x = numbers(8, oracle.shared_engine().config.hidden)
    clean, stale = (KVCache(*(Tensor.full((20, KV_HEADS, DIM), fill).contiguous().realize() for _ in range(2)))
                    for fill in (0.0, 100.0))
    assert np.array_equal(layer(x, 0, clean), layer(x, 0, stale))
