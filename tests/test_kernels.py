"""Kernels written by hand against their plain-tensor twins, and packed weights against the file's own unpacking."""
import numpy as np
import pytest
from tinygrad import Tensor, dtypes

from minillama.blocks import FORMATS, pack, unpack
from minillama.delta_net import chunked
from minillama.kernels import attention, chunks, delta, groups, norm, product, ring, router, tensor_cores
from minillama.kernels.layouts import LAYOUTS
from minillama.kernels.packed import Packed, rows_of, unpacked
from minillama.layers import l2_norm, rms_norm, rope

TOLERANCE = 5e-6        # relative to the largest value; float32 sums in another order differ by some 1e-6
EACH = pytest.mark.parametrize("format", LAYOUTS)
SOME = pytest.mark.parametrize("format", ("F16", "Q8_0", "Q4_0", "Q5_1", "Q4_K", "Q6_K"))
TINY, LARGEST = 6e-8, 65504.0      # the smallest and the largest half


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


def packed(format: str, *shape: int, seed: int = 0) -> Packed:
    """A matrix of random values, rows of very different size, packed by the file's rules."""
    values = numbers(*shape, seed=seed) * 10.0 ** np.random.default_rng(seed).integers(-2, 2, (*shape[:-1], 1))
    return from_raw(pack(values.astype(np.float32), FORMATS[format]), format, *shape)


def from_raw(raw: np.ndarray, format: str, *shape: int) -> Packed:
    return Packed.from_bytes(Tensor(raw.reshape(int(np.prod(shape[:-1])), -1)), format, shape)


# ---- layouts ------------------------------------------------------------------------------------------------------


@EACH
def test_repacked_bytes_are_as_many_and_give_the_same_values_to_the_last_bit(format):
    raw = pack(numbers(6, 512), FORMATS[format])
    weight = from_raw(raw, format, 6, 512)
    assert weight.nbytes() == raw.size
    want = unpack(raw, FORMATS[format], (6, 512))
    assert np.array_equal(weight.values().numpy(), want)
    assert off(unpacked(weight), want) < 1e-6


@pytest.mark.parametrize("format", [name for name in LAYOUTS if name not in ("F32", "BF16")])
@pytest.mark.parametrize("scale", (0.0, TINY, 1e-6, LARGEST))
def test_scales_that_are_zero_subnormal_or_largest_are_widened_rightly(format, scale):
    """Random blocks whose every half (scale, minimum) is one number: its bits are written over the packed ones."""
    size, half = FORMATS[format].size, np.float16(scale).view(np.uint16).item().to_bytes(2, "little")
    raw = np.random.default_rng(1).integers(0, 256, (4, max(1, 256 // FORMATS[format].block), size), dtype=np.uint8)
    places = {"F16": (0,), "Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for place in places.get(format, (0,)):
        raw[..., place:place + 2] = np.frombuffer(half, np.uint8)
    want = unpack(raw.reshape(-1), FORMATS[format], (4, 256))
    weight = from_raw(raw, format, 4, 256)
    assert np.array_equal(weight.values().numpy(), want)
    assert off(unpacked(weight), want) < 1e-6
    x = tensor(1, 256)
    assert off(product.linear(x, weight), x.numpy() @ want.T) < TOLERANCE


def test_bytes_that_do_not_fill_the_shape_are_refused():
    with pytest.raises(ValueError, match="36 bytes of Q4_0 cannot fill the shape"):
        Packed.from_bytes(Tensor(np.zeros((2, 18), np.uint8)), "Q4_0", (2, 64))


@SOME
def test_rows_are_looked_up_by_number(format):
    weight, ids = packed(format, 20, 256), integers(5, below=20)
    assert off(rows_of(weight, ids), weight.values().numpy()[ids.numpy()]) < 1e-6


# ---- products -----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("tokens", (1, 3))
def test_a_product_equals_its_twin(format, tokens):
    weight, x, residual = packed(format, 48, 512), tensor(tokens, 512), tensor(tokens, 48, seed=1)
    assert off(product.linear(x, weight), product.linear_twin(x, weight)) < TOLERANCE
    assert off(product.linear(x, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


@SOME
@pytest.mark.parametrize("tokens", (1, 3))
def test_chosen_experts_equal_their_twins(format, tokens):
    gate, up, down = (packed(format, 6, *shape, seed=i) for i, shape in enumerate(((32, 256), (32, 256), (64, 256))))
    ids, share, x = integers(tokens, 2, below=6), tensor(tokens, 2), tensor(tokens, 256)
    assert off(product.gated(x, gate, up, ids, share), product.gated_twin(x, gate, up, ids, share)) < TOLERANCE
    routed, residual = tensor(tokens, 2, 256), tensor(tokens, 64)
    assert off(product.mixed(routed, down, ids, residual), product.mixed_twin(routed, down, ids, residual)) < TOLERANCE


@pytest.mark.parametrize("tokens", (1, 3))
def test_the_shared_expert_equals_its_twin_with_halves_of_different_formats(tokens):
    gate, up = packed("Q4_0", 64, 256), packed("Q8_0", 64, 256, seed=1)
    share, x = (tensor(256) / 16).realize(), tensor(tokens, 256)
    assert off(product.shared_gated(x, gate, up, share), product.shared_gated_twin(x, gate, up, share)) < TOLERANCE


@pytest.mark.parametrize("skewed", (False, True))
@pytest.mark.parametrize(("tokens", "experts"), ((20, 6), (40, 64)))
def test_grouped_experts_equal_chosen_ones_however_tokens_are_routed(tokens, experts, skewed):
    gate, up, down = (packed("Q4_0", experts, *shape, seed=i)
                      for i, shape in enumerate(((64, 64), (64, 64), (64, 64))))
    chosen = np.stack([np.random.default_rng(t).permutation(experts)[:3] for t in range(tokens)])
    ids = Tensor((chosen * 0 + [4, 1, 3] if skewed else chosen).astype(np.int32)).realize()
    x, share = tensor(tokens, 64) / 64, tensor(tokens, 3)
    found = groups.group(ids, experts)
    places = found.places.numpy().ravel()
    assert len(set(places.tolist())) == places.size, "two assignments in one place"
    assert np.array_equal(found.experts.numpy()[places // found.tile], ids.numpy().ravel())
    assert ((found.rows.numpy().reshape(-1, found.tile) >= 0).any(1) == (found.experts.numpy() >= 0)).all()
    got = groups.experts(x, gate, up, down, found, share)
    want = product.mixed_twin(product.gated_twin(x, gate, up, ids, share), down, ids)
    assert off(got, want) < TOLERANCE
    halves = groups.summed(groups.in_halves(x, gate, up, down, found, share), found)
    assert off(halves, want) < TOLERANCE


# ---- products of halves: here a plain loop; what tensor cores make of it is seen by rendering, and on a GPU ---------


@pytest.mark.host       # OpenCL never runs them
@pytest.mark.parametrize("format", [name for name, layout in LAYOUTS.items() if layout.span])
def test_a_product_of_halves_equals_its_twin(format):
    weight, x, residual = packed(format, 48, 512), tensor(24, 512), tensor(24, 48, seed=1)
    assert tensor_cores.fits(weight)
    halves = tensor_cores.halves(x)
    assert off(tensor_cores.linear(halves, weight), product.linear_twin(x, weight)) < TOLERANCE
    assert off(tensor_cores.linear(halves, weight, residual), product.linear_twin(x, weight, residual)) < TOLERANCE


def test_what_halves_cannot_hold_is_refused():
    assert not any(tensor_cores.fits(packed(name, 16, 512)) for name in ("F32", "BF16"))
    assert not tensor_cores.fits(packed("Q4_0", 16, 32))        # one span is no loop


def added(halves: tensor_cores.Halves) -> Tensor:
    """The numbers that pairs of halves stand for."""
    return halves.parts[:, 0].float() + halves.parts[:, 1].float() / tensor_cores.LOW


@pytest.mark.host       # PoCL rounds the product of two halves to a half, and has no subnormal ones
@pytest.mark.parametrize("scale", (1e-2, 1.0, 1e3))
def test_products_of_pairs_of_halves_keep_21_bits(scale):
    a, b = numbers(24, 256) * scale, numbers(16, 256, seed=1)
    exact = a.astype(np.float64) @ b.astype(np.float64).T
    for form in (tensor_cores.product, tensor_cores.long_product):
        assert off(form(Tensor(a), Tensor(b)), exact) < TOLERANCE
    a[0, 0] = 1e6                                               # more than the largest half
    assert np.isfinite(tensor_cores.product(Tensor(a), Tensor(b)).numpy()).all()


def test_two_halves_hold_a_float_to_21_bits():
    x = tensor(20, 256)
    halves = tensor_cores.halves(x)
    assert off(added(halves), x) < 2.0 ** -21
    small = (x / 4096).realize()
    assert off(added(tensor_cores.halves(small)), small) < 2.0 ** -14
    assert off(halves.sums, x.numpy().reshape(20, -1, tensor_cores.SPAN).sum(-1)) < 1e-6


def test_what_no_half_can_hold_is_taken_for_the_largest_that_it_can():
    x = Tensor([[6e4, -6e4, 1e6, -1e38] + [0.0] * 12]).realize()
    found = added(tensor_cores.halves(x)).numpy()[0, :4]
    assert np.allclose(found, [6e4, -6e4, LARGEST, -LARGEST], rtol=2 ** -21)


# ---- what is small ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ((1, 256), (3, 2048), (2, 96)))
def test_the_norm_equals_its_twin(shape):
    x, weight = tensor(*shape), tensor(shape[1], seed=1)
    assert off(norm.rms_norm(x, weight, 1e-6), norm.rms_norm_twin(x, weight, 1e-6)) < TOLERANCE


@pytest.mark.parametrize(("experts", "used"), ((512, 10), (16, 4), (6, 2)))
def test_the_router_chooses_as_its_twin_and_ties_go_to_the_smaller_number(experts, used):
    logits = Tensor(np.round(3 * numbers(3, experts), 1)).realize()
    ids, probs = router.route(logits, used)
    want, shares = router.route_twin(logits, used)
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")[:, :used]
    assert np.array_equal(ids.numpy(), want.numpy()) and np.array_equal(ids.numpy(), order)
    assert off(probs, shares) < TOLERANCE and np.allclose(probs.numpy().sum(1), 1)


def test_a_ring_is_read_and_written_by_position_past_its_end():
    rows, position = tensor(5, 2, 3), Tensor([13], dtype=dtypes.int32).realize()
    before, new = rows.numpy(), tensor(2, 2, 3, seed=1)
    read, after = ring.read(rows, position, -3, 3)
    written = ring.write(after, new, position)
    Tensor.realize(read, written)
    assert np.array_equal(read.numpy(), before[[0, 1, 2]])
    before[[3, 4]] = new.numpy()
    assert np.array_equal(rows.numpy(), before)


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


@pytest.mark.parametrize("form", ("by_columns", "by_heads"))
@pytest.mark.parametrize(("tokens", "position"), ((1, 0), (1, 31), (3, 4)))
def test_the_delta_step_equals_its_twin_in_both_forms(form, tokens, position):
    from tinygrad import Device
    if form == "by_heads" and not Device[Device.DEFAULT].renderer.has_local:
        pytest.skip("no memory that threads share on this device")
    z, b, a = 2, 2 + VALUES, 2 + VALUES + V_HEADS       # the first columns of a projection
    qkv, source, memories = tensor(tokens, CHANNELS), tensor(tokens, a + V_HEADS), tensor(SLOTS, V_HEADS, DIM, DIM)
    small = tensor(V_HEADS), Tensor(-np.abs(numbers(V_HEADS))).realize(), tensor(DIM)
    twin = delta.step_twin(qkv, source[:, z:b], source[:, b:a], source[:, a:], Tensor(memories.numpy()), *small, 1e-6,
                           position)
    want, kept = (x.numpy() for x in twin)
    got = getattr(delta, form)(qkv, (source, z), (source, b), (source, a), memories, *small, 1e-6,
                               Tensor([position], dtype=dtypes.int32).realize())
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


@pytest.mark.parametrize(("tokens", "position"), ((1, 0), (1, 70), (3, 126)))
def test_attention_in_parts_equals_its_twin_on_both_sides_of_a_part(tokens, position):
    from tinygrad import Device
    if not Device[Device.DEFAULT].renderer.has_local:
        pytest.skip("no memory that threads share on this device")
    heads, kv_heads, dim, half, positions = 4, 2, 128, 16, 200
    k, v = 2 * heads * dim, (2 * heads + kv_heads) * dim        # first columns of the projection [q | k | v]
    source, weight, table = tensor(tokens, v + kv_heads * dim), tensor(dim), tensor(positions, 2, half, seed=2)
    keys, values = (tensor(positions, kv_heads, dim, seed=i) for i in (3, 4))
    at, now = Tensor([position], dtype=dtypes.int32).realize(), slice(position, position + tokens)
    wanted_keys, wanted_values = keys.numpy(), values.numpy()
    q = source[:, :k].reshape(tokens, heads, 2, dim)
    wanted = rope(rms_norm(q[:, :, 0], weight, 1e-6), table[now])
    wanted_keys[now] = rope(rms_norm(source[:, k:v].reshape(tokens, kv_heads, dim), weight, 1e-6), table[now]).numpy()
    wanted_values[now] = source[:, v:].reshape(tokens, kv_heads, dim).numpy()
    got = attention.rotated((source, 0), weight, 1e-6, table, heads, 2 * dim, at, Tensor.empty(tokens, heads, dim),
                            False)
    keys = attention.rotated((source, k), weight, 1e-6, table, kv_heads, dim, at, keys, True)
    values = attention.stored((source, v), values, at)
    y = attention.attend(got, keys, values, (source, dim), 2 * dim, at)
    twin = attention.attend_twin(wanted, Tensor(wanted_keys), Tensor(wanted_values), q[:, :, 1], position)
    assert off(got, wanted) < TOLERANCE and off(y, twin) < TOLERANCE
    assert off(keys, wanted_keys) < TOLERANCE and np.array_equal(values.numpy(), wanted_values)


@pytest.mark.parametrize(("heads", "kv_heads", "dim", "can"), (
    (16, 2, 256, True), (24, 4, 256, False), (4, 2, 32, True), (8, 8, 128, False), (4, 2, 96, False)))
def test_attention_knows_which_heads_it_can_divide(heads, kv_heads, dim, can):
    assert attention.fits(heads, kv_heads, dim) is can
    if not can:
        with pytest.raises(ValueError, match="cannot be divided among threads$"):
            cache = tensor(4, kv_heads, dim)
            attention.attend(tensor(1, heads, dim), cache, cache, (tensor(1), 0), 0, tensor(1))
