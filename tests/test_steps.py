"""Kernels in steps, those of a CPU's prompts, equal their twins."""
import numpy as np
import pytest
from arrays import TOLERANCE, numbers, off, tensor
from tinygrad import Device, Tensor, UOp, dtypes

from minillama import delta_net
from minillama.kernels import flash_loops, norm, recurrence
from minillama.kernels.attention import attend_twin
from minillama.kernels.cores import on_cpu
from minillama.kernels.product import number
from minillama.kernels.steps import Steps, real

pytestmark = pytest.mark.skipif(not on_cpu(Device.DEFAULT), reason="this device is no CPU")


def delta_inputs(tokens: int, k_heads: int, v_heads: int, dim: int, text: int) -> list[Tensor]:
    """q, k, v, g, beta and a state; what follows the `text` neither decays nor writes."""
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (numbers(tokens, k_heads, dim, seed=n)
                                                                  for n in (1, 2)))
    mask = (np.arange(tokens) < text)[:, None]
    g, strength = -np.abs(numbers(tokens, v_heads, seed=3)), numbers(tokens, v_heads, seed=4)
    g, beta = g * mask, 1 / (1 + np.exp(strength)) * mask
    parts = q, k, numbers(tokens, v_heads, dim, seed=5), g, beta, numbers(v_heads, dim, dim, seed=6)
    return [Tensor(part.astype(np.float32)).realize() for part in parts]


@pytest.mark.parametrize("tokens, k_heads, v_heads, dim, text", (
    (64, 2, 4, 64, 64), (64, 2, 4, 64, 39), (192, 1, 1, 32, 192), (7, 3, 3, 6, 7), (18, 3, 9, 10, 5), (2, 1, 3, 3, 1)))
def test_a_prompt_token_by_token_equals_its_twins(tokens, k_heads, v_heads, dim, text):
    inputs = delta_inputs(tokens, k_heads, v_heads, dim, text)
    assert recurrence.fits(Device.DEFAULT, tokens)
    got = recurrence.recurrent(*inputs)
    chunks = tokens > 64 or tokens & tokens - 1 == 0
    want = (delta_net.chunked if chunks else delta_net.recurrent)(*inputs)
    Tensor.realize(*got, *want)
    for mine, other in zip(got, want, strict=True):
        assert off(mine, other) < TOLERANCE


def test_both_forms_can_take_turns_and_the_fused_one_is_by_hand(monkeypatch):
    asked = []
    monkeypatch.setattr(delta_net.recurrence, "recurrent", lambda *given, by_hand=recurrence.recurrent:
                        asked.append(1) or by_hand(*given))
    inputs = delta_inputs(128, 2, 4, 16, 128)
    *parts, state = inputs
    first, state = recurrence.recurrent(*(x[:64] for x in parts), state)
    second, state = delta_net.fused(*(x[64:] for x in parts), state)
    want, last = delta_net.chunked(*inputs)
    assert len(asked) == 2 and off(first.cat(second), want) < TOLERANCE and off(state, last) < TOLERANCE


@pytest.mark.parametrize("tokens, heads, kv_heads, dim, positions, start", (
    (64, 4, 2, 64, 256, 0), (64, 4, 2, 64, 256, 150), (512, 2, 2, 16, 1024, 512), (48, 3, 1, 6, 128, 37),
    (24, 3, 3, 8, 64, 40), (17, 2, 1, 5, 192, 128)))
def test_attention_in_one_pass_equals_its_twin(tokens, heads, kv_heads, dim, positions, start):
    q, keys, values = (tensor(*shape, seed=n) for n, shape in enumerate((
        (tokens, heads, dim), (positions, kv_heads, dim), (positions, kv_heads, dim))))
    gate, position = tensor(tokens, 3 + heads * 2 * dim, seed=5), Tensor([start], dtype=dtypes.int32).realize()
    assert flash_loops.fits(Device.DEFAULT, tokens, positions)
    got = flash_loops.attend(q, keys, values, (gate, 3 + dim), 2 * dim, position)
    gates = gate[:, 3:].reshape(tokens, heads, 2 * dim)[:, :, dim:]
    assert off(got, attend_twin(q, keys, values, gates, start)) < TOLERANCE


def test_queries_behind_the_cache_see_anything_but_end():
    q, keys, gate = tensor(64, 2, 8), tensor(128, 2, 8, seed=1), tensor(64, 16, seed=2)
    position = Tensor([100], dtype=dtypes.int32).realize()
    got = flash_loops.attend(q, keys, keys, (gate, 0), 8, position).numpy()
    want = attend_twin(q[:28], keys, keys, gate[:28].reshape(28, 2, 8), 100).numpy()
    assert off(Tensor(got[:28]), want) < TOLERANCE


def test_scores_that_rise_and_fall_by_hundreds_stay_numbers():
    q, keys = tensor(64, 1, 16) * 100, tensor(192, 1, 16, seed=1) * 40
    values, gate = tensor(192, 1, 16, seed=2), tensor(64, 16, seed=3)
    got = flash_loops.attend(q.realize(), keys.realize(), values, (gate, 0), 16, Tensor([100], dtype=dtypes.int32))
    want = attend_twin(q, keys, values, gate.reshape(64, 1, 16), 100)
    assert np.isfinite(got.numpy()).all() and off(got, want) < 1e-4


@pytest.mark.parametrize("tokens, heads, dim", ((64, 4, 64), (1, 3, 10), (5, 1, 7)))
def test_the_gated_norm_equals_its_twin(tokens, heads, dim):
    x, weight, gate = tensor(tokens, heads, dim), tensor(dim, seed=1), tensor(tokens, 5 + heads * dim, seed=2)
    got = norm.gated(x, weight, 1e-6, (gate, 5))
    assert off(got, norm.gated_twin(x, weight, 1e-6, gate[:, 5:])) < TOLERANCE


@pytest.mark.parametrize("size", (1, 3, 16, 24, 64, 320))
@pytest.mark.parametrize("parts", (1, 6, 32))
def test_a_sum_in_a_kernel_has_all_terms_in_each_part(size, parts):
    x = tensor(parts, size)

    def kernel(out: UOp, x: UOp) -> UOp:
        steps = Steps(Device.DEFAULT)
        part = steps.each(parts, shared=True)
        total = steps.sum(size, lambda place: x.index(part, place).load())
        steps.do((), out.index(part).store(total))
        return steps.kernel(f"test_sum_{parts}_{size}")
    got = Tensor.empty(parts, dtype=dtypes.float32).custom_kernel(x, fxn=kernel)[0]
    assert np.abs(got.numpy() - x.numpy().sum(1)).max() < 1e-4


def test_a_loop_can_end_at_a_number_that_another_loop_knows():
    counts = Tensor([1, 7, 3, 8], dtype=dtypes.int32).realize()

    def kernel(out: UOp, counts: UOp) -> UOp:
        steps = Steps(Device.DEFAULT)
        row = steps.each(4)
        steps.do((), out.index(row).store(real(0)))
        loop, turn = steps.repeat(8)
        cell = steps.now(out, loop).index(row)
        steps.do((), cell.store(cell.load() + turn.cast(dtypes.float32)))
        steps.until(loop, turn, number(counts.index(row)))
        return steps.kernel("test_repeat")
    got = Tensor.empty(4, dtype=dtypes.float32).custom_kernel(counts, fxn=kernel)[0]
    assert got.tolist() == [0, 21, 3, 28]
