"""Kernels of layers against their plain-tensor twins: Gated DeltaNet, token by token and in chunks; attention."""
import numpy as np
import pytest
from arrays import TOLERANCE, numbers, off, tensor, threads_share
from tinygrad import Tensor, dtypes

from minillama.attention import over_cache
from minillama.delta_net import chunked
from minillama.kernels import attention, chunks, delta
from minillama.layers import l2_norm, rms_norm, rope

# ---- Gated DeltaNet -----------------------------------------------------------------------------------------------

K_HEADS, V_HEADS, DIM, SLOTS = 2, 4, 32, 5
CHANNELS, VALUES = (2 * K_HEADS + V_HEADS) * DIM, V_HEADS * DIM


@pytest.mark.parametrize("position", (0, 5, 31))
@pytest.mark.parametrize("tokens", (1, 3))
def test_the_convolution_equals_its_twin_and_keeps_its_inputs(tokens, position):
    inputs, history, weight = tensor(tokens, CHANNELS + 3), tensor(delta.HISTORY, CHANNELS), tensor(CHANNELS, 4)
    want, kept = (x.numpy() for x in delta.conv_twin(inputs[:, 3:], Tensor(history.numpy()), weight, position))
    got = delta.conv((inputs, 3), history, weight, Tensor([position], dtype=dtypes.int32).realize())
    assert off(got, want) < TOLERANCE and np.array_equal(history.numpy(), kept)


@pytest.mark.parametrize("form", ("by columns", "by heads", "by heads, convolved"))
@pytest.mark.parametrize(("tokens", "position"), ((1, 0), (1, 31), (3, 4)))
def test_the_delta_step_equals_its_twin_in_all_forms(form, tokens, position, monkeypatch):
    if form == "by columns":
        monkeypatch.setattr(delta, "by_blocks", lambda ring: False)
    else:
        threads_share(monkeypatch)
    z, b, a = 2, 2 + VALUES, 2 + VALUES + V_HEADS       # the first columns of a projection
    qkv, source, memories = tensor(tokens, CHANNELS), tensor(tokens, a + V_HEADS), tensor(SLOTS, V_HEADS, DIM, DIM)
    small = tensor(V_HEADS), Tensor(-np.abs(numbers(V_HEADS))).realize(), tensor(DIM)
    history, weight, before = tensor(delta.HISTORY, CHANNELS), tensor(CHANNELS, 4), memories.numpy()
    at, given = Tensor([position], dtype=dtypes.int32).realize(), ((source, z), (source, b), (source, a), memories)
    if form.endswith("convolved"):
        inputs = tensor(tokens, CHANNELS + 3, seed=5)
        qkv, inputs_kept = (x.realize() for x in delta.conv_twin(inputs[:, 3:], Tensor(history.numpy()), weight,
                                                                 position))
        got = delta.conv_and_step((inputs, 3), history, weight, *given, *small, 1e-6, at).realize()
        assert np.array_equal(history.numpy(), inputs_kept.numpy())
    else:
        got = delta.step(qkv, *given, *small, 1e-6, at)
    want, kept = (x.numpy() for x in delta.step_twin(
        qkv, source[:, z:b], source[:, b:a], source[:, a:], Tensor(before), *small, 1e-6, position))
    assert off(got, want) < TOLERANCE and off(memories, kept) < TOLERANCE


@pytest.mark.parametrize("case", ("any", "strong decay", "one key", "padding"))
def test_chunks_in_two_kernels_equal_the_chunked_form(case):
    from tinygrad import Device
    if not Device[Device.DEFAULT].renderer.has_local:
        pytest.skip("no memory that threads share on this device")
    tokens, chunk = 48, 16
    q, k = l2_norm(tensor(tokens, K_HEADS, DIM)).realize(), l2_norm(tensor(tokens, K_HEADS, DIM, seed=1)).realize()
    v, g, beta = tensor(tokens, V_HEADS, DIM), -tensor(tokens, V_HEADS).exp(), tensor(tokens, V_HEADS).sigmoid()
    state, text = tensor(V_HEADS, DIM, DIM, seed=2), (Tensor.arange(tokens) < 16).float().reshape(-1, 1)
    g, beta = {"any": (g, beta), "strong decay": (g * 30, beta), "one key": (g * 0, beta * 0 + 1),
               "padding": (g * text, beta * text)}[case]
    k = k[:1].expand(k.shape).contiguous() if case == "one key" else k
    given = [x.realize() for x in (q, k, v, g, beta, state)]
    out, after = chunks.chunked(*given, chunk=chunk)
    wanted, memory = chunked(*given, chunk=chunk)
    assert off(out, wanted) < TOLERANCE and off(after, memory) < TOLERANCE
    if case == "padding":
        first = [x[:16].realize() for x in given[:5]]
        assert np.array_equal(after.numpy(), chunks.chunked(*first, state, chunk=chunk)[1].numpy())


def test_which_prompts_the_two_kernels_take():
    assert chunks.fits("CUDA", 512, 128) and chunks.fits("METAL:1", 64, 64)
    wrong = ("CPU", 512, 128), ("CUDA", 8, 128), ("CUDA", 512, 32), ("CUDA", 64, 192), ("CUDA", 64, 1024)
    assert not any(chunks.fits(*case) for case in wrong)


def test_more_tokens_than_a_ring_has_room_for_are_refused():
    with pytest.raises(ValueError, match="^5 tokens need 6 slots, the ring has 5$"):
        delta.step(tensor(5, CHANNELS), *[(tensor(5, VALUES), 0)] * 3, tensor(SLOTS, V_HEADS, DIM, DIM), tensor(1),
                   tensor(1), tensor(1), 1e-6, tensor(1))
    with pytest.raises(ValueError, match="^9 tokens at once: the history has room for 8$"):
        delta.conv((tensor(9, CHANNELS), 0), tensor(delta.HISTORY, CHANNELS), tensor(CHANNELS, 4), tensor(1))


# ---- attention ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ("loops", "threads"))
@pytest.mark.parametrize(("tokens", "position", "kv_heads", "dim"), (
    (1, 0, 2, 128), (1, 70, 1, 64), (3, 126, 2, 128), (5, 62, 1, 32), (1, 30, 4, 64), (2, 15, 2, 512),
    (3, 290, 2, 64)))
def test_attention_in_both_forms_equals_its_twin_on_both_sides_of_a_part(form, tokens, position, kv_heads, dim,
                                                                         monkeypatch):
    if form == "threads":
        threads_share(monkeypatch)
    heads, half, positions = 4, 16, 300
    k, v = 2 * heads * dim, (2 * heads + kv_heads) * dim        # first columns of the projection [q | k | v]
    source, weight, other = tensor(tokens, v + kv_heads * dim), tensor(dim), tensor(dim, seed=1)
    table = tensor(positions, 2, half, seed=2)
    keys, values = (tensor(positions, kv_heads, dim, seed=i) for i in (3, 4))
    at, now = Tensor([position], dtype=dtypes.int32).realize(), slice(position, position + tokens)
    wanted_keys, wanted_values = keys.numpy(), values.numpy()
    q = source[:, :k].reshape(tokens, heads, 2, dim)
    wanted = rope(rms_norm(q[:, :, 0], weight, 1e-6), table[now])
    wanted_keys[now] = rope(rms_norm(source[:, k:v].reshape(tokens, kv_heads, dim), other, 1e-6), table[now]).numpy()
    wanted_values[now] = source[:, v:].reshape(tokens, kv_heads, dim).numpy()
    got, = attention.rotated((source, 0), weight, 1e-6, table, heads, 2 * dim, at, Tensor.empty(tokens, heads, dim))
    keys, values = attention.rotated((source, k), other, 1e-6, table, kv_heads, dim, at, keys, ((source, v), values))
    y = attention.attend(got, keys, values, (source, dim), 2 * dim, at) if form == "threads" else over_cache(
        got, q[:, :, 1], keys, values, position).reshape(tokens, -1)
    twin = attention.attend_twin(wanted, Tensor(wanted_keys), Tensor(wanted_values), q[:, :, 1], position)
    assert off(got, wanted) < TOLERANCE and off(y, twin) < TOLERANCE
    assert off(keys, wanted_keys) < TOLERANCE and np.array_equal(values.numpy(), wanted_values)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "positions", "can"), (
    (16, 2, 256, 4, True), (24, 4, 256, 4, True), (4, 2, 32, 4, True), (4, 2, 96, 4, False), (4, 2, 2, 4, False),
    (99, 1, 64, 4, False), (32, 2, 256, 4, True), (64, 1, 256, 4, False), (40, 2, 4, 4, False),
    (16, 2, 256, 262144, True), (4, 2, 64, 262144, False), (16, 2, 256, 1 << 20, False)))
def test_attention_knows_which_heads_it_can_divide_and_how_many_parts_have_room(heads, kv_heads, dim, positions, can):
    assert attention.fits(heads, kv_heads, dim, positions) is can
    if not can:
        with pytest.raises(ValueError, match="too much for threads$"):
            cache = Tensor.empty(positions, kv_heads, dim)
            attention.attend(tensor(1, heads, dim), cache, cache, (tensor(1), 0), 0, tensor(1))
